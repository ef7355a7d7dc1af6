"""Judge: public statements, the studies that test them at the scale at hand, and the verdicts on record."""
