"""Students made from a teacher: names the folder."""
