"""Balance inside one step: from one layer's counts, who computes how many pairs. Pure, equal on every rank."""
