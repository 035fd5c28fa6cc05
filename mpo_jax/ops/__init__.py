"""Pure array functions: no parameters, no configuration, no I/O."""
