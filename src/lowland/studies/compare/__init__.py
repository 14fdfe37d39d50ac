"""Networks trained with and without each penalty, and what comes out."""
