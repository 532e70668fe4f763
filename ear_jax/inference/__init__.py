"""A trained model in use: its compiled programs, and the pipeline around them."""
