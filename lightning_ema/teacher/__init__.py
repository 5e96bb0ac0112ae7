"""An average that is a module of its own."""
