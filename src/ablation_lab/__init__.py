"""Ablation studies of Keras image classifiers: variants, plans, cells, paired comparisons."""
