"""Files of human preferences enter; batches of static shape leave."""
