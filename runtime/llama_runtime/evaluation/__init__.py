"""How good a bundle is: its predictions of real texts against those of the fp32 source."""
