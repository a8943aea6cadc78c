"""What runs will cost, here and on other machines."""
