//! Idea 2: what happens in which order, made before anything starts.
