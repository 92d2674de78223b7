"""From a command line to a running chain: what is asked for, which jobs it becomes, and how they are sent."""
