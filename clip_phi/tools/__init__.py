"""Tools that look at data, memory and the machine before a run."""
