"""Which machines the paper's pairs fit, by their compilers."""
