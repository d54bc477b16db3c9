"""The command prompt of `memtierd`: lines in, the reference's commands and texts out."""
