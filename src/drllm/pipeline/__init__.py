"""The stages in a row: `folder.run` carries out a recipe, `sweeps.sweep` many settings of one."""
