"""The stages of a run: each takes a job, trains or computes, and leaves one artifact folder."""
