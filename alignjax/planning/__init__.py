"""Planning: what the programs of a run need and cost on machines that may not be here."""
