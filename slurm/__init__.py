"""HOW a site runs jobs; knows neither BERT nor torch."""
