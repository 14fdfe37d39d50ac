"""The study of flatness-aware regularization: the penalty ``Tr(H^2) / B`` over its weight."""
