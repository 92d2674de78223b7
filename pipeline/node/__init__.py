"""Around one process of a stage: which rank it is, its peers, its watcher, and being asked to stop."""
