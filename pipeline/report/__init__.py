"""The page about a run, one HTML file; nothing heavy is imported here."""
