"""Where people meet metapool: command line, recipes, report."""
