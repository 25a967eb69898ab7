"""What the results say: a report for each recipe, the table of all, and pictures."""


def write(recipe, found, out):
    return "soon"


def write_table(root):
    return "soon"
