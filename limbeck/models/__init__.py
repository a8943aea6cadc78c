"""Loading models and asking what they are."""
