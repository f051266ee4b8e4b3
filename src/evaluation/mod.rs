//! Scoring: prompt lists, metrics, the protocol, the report.

pub mod prompts;
