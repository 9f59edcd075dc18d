"""Results → figures, tables, Markdown, HTML, without TensorFlow."""
