"""The only code that sees real images."""
