"""A network that a federation of clients trains, sparser round by round."""
