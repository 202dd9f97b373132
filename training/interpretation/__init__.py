"""What a concept stands for: its strongest pairs, a label, how alike they are, and pages to browse them."""
