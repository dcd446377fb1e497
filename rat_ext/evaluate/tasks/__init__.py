"""Tasks of lm-eval: YAML files, what makes their documents, and a text."""
