"""Layouts of adapter files, one file each: `name_layers` for what a reader looks for, `write` for what it is given."""
