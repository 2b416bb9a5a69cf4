"""Training footage: what is filmed, imported or rendered, behind one interface (`take.Footage`)."""
