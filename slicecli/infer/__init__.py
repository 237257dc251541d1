"""The auto adapter: a declaration inferred from a model nobody declared, and proved before it is used."""
