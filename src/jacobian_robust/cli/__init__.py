"""The commands: ``jacobian-robust`` and its subcommands, their one-line errors, sweeps."""
