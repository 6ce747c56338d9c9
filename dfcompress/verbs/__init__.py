"""The verbs of the command line, each a function of its file's name; files with an underscore are what verbs share."""
