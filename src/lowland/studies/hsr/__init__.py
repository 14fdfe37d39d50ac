"""The numerical study of arXiv:2606.28662: search, control, theory, figures, claims; and ours."""
