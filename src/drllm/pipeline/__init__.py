"""All stages in a row: `folder.run` carries out a recipe."""
