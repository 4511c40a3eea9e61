"""The dataset doctor: what is wrong with the images and captions of a run, found before anything is loaded."""
