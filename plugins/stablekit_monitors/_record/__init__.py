"""How a run is recorded: rows in memory, their files, and the folder they are in."""
