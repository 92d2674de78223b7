"""One run as data: its folder, attempts, chain, journal, states, account, and what stood out."""
