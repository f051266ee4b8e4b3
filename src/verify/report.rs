//! What a comparison came to, as text and as JSON.

use std::fmt::Write;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::compare::GradientState;
use super::{Component, Precision};

/// How many tensors are named one by one.
const NAMED: usize = 5;

/// One output against the reference's.
#[derive(Debug, Clone)]
pub struct OutputResult {
    /// `output` or `output.NAME`.
    pub name: String,
    /// In the reference file.
    pub shape: Vec<usize>,
    /// Of what was computed here.
    pub computed_shape: Vec<usize>,
    /// Relative L2 error; of tokens the share that differs without being tied.
    pub error: f64,
    /// Counts, where the output is tokens.
    pub tokens: Option<Tokens>,
    pub passed: bool,
}

/// Tokens against tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tokens {
    pub count: usize,
    /// Different, where both codes are as good as nearest.
    pub ties: usize,
    /// Different without such a reason.
    pub different: usize,
    /// The first of these, counted through the whole batch.
    pub first_different: Option<usize>,
}

/// One gradient against the reference's.
#[derive(Debug, Clone)]
pub struct GradientResult {
    /// The adapter's weight.
    pub name: String,
    pub shape: Vec<usize>,
    /// L2 norm of the reference's.
    pub norm: f64,
    /// Whether that is less than what any gradient may be off by.
    pub below_floor: bool,
    /// Relative L2 error.
    pub error: f64,
    pub state: GradientState,
}

/// What was compared, and how it compares.
#[derive(Debug, Clone)]
pub struct Report {
    pub component: Component,
    /// Where the component was found.
    pub folder: PathBuf,
    pub adapter: Option<PathBuf>,
    pub reference: PathBuf,
    pub precision: Precision,
    pub tolerance: f64,
    pub gradient_tolerance: f64,
    pub outputs: Vec<OutputResult>,
    /// In the order of their names.
    pub gradients: Vec<GradientResult>,
    pub notes: Vec<String>,
}

impl Report {
    /// Whether everything is within tolerance.
    pub fn passed(&self) -> bool {
        self.outputs.iter().all(|output| output.passed)
            && self
                .gradients
                .iter()
                .all(|gradient| gradient.state == GradientState::Equal)
    }

    /// Gradients that tell something, the worst first.
    fn worst_gradients(&self) -> Vec<&GradientResult> {
        let mut gradients: Vec<&GradientResult> = self
            .gradients
            .iter()
            .filter(|g| !(g.below_floor && g.state == GradientState::Equal))
            .collect();
        let order = |g: &GradientResult| (g.state == GradientState::Equal, -g.error);
        gradients.sort_by(|a, b| {
            let ((a_equal, a_error), (b_equal, b_error)) = (order(a), order(b));
            a_equal.cmp(&b_equal).then(a_error.total_cmp(&b_error))
        });
        gradients
    }

    /// For people: every output, the worst gradients and every one that fails, what is worth knowing, the verdict.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{} · {} · {}",
            self.component,
            self.folder.display(),
            self.precision
        );
        if let Some(adapter) = &self.adapter {
            let _ = write!(text, " · adapter {}", adapter.display());
        }
        let _ = writeln!(text, "\nreference {}", self.reference.display());
        for output in &self.outputs {
            let _ = writeln!(text, "{}", self.output_line(output));
        }
        if !self.gradients.is_empty() {
            let failed = self.failed_gradients();
            let _ = writeln!(
                text,
                "gradients: {} of {} within {:.1e}; the worst:",
                self.gradients.len() - failed,
                self.gradients.len(),
                self.gradient_tolerance
            );
            for gradient in self.worst_gradients().iter().take(NAMED.max(failed)) {
                let _ = writeln!(text, "  {}", gradient_line(gradient));
            }
        }
        for note in &self.notes {
            let _ = writeln!(text, "note: {note}");
        }
        let verdict = if self.passed() {
            "equal within tolerance"
        } else {
            "different"
        };
        let _ = writeln!(text, "{verdict}");
        text
    }

    /// One sentence on what is different, for the error; `None` where nothing is.
    pub fn difference(&self) -> Option<String> {
        if self.passed() {
            return None;
        }
        let mut parts: Vec<String> = self
            .outputs
            .iter()
            .filter(|output| !output.passed)
            .map(|output| self.output_line(output))
            .collect();
        let failed = self.failed_gradients();
        if let Some(worst) = self.worst_gradients().first().filter(|_| failed > 0) {
            parts.push(format!(
                "{failed} of {} gradients differ, the worst: {}",
                self.gradients.len(),
                gradient_line(worst)
            ));
        }
        Some(format!(
            "{} does not compute what its reference computed:\n  {}",
            self.component,
            parts.join("\n  ")
        ))
    }

    fn failed_gradients(&self) -> usize {
        let failed = |g: &&GradientResult| g.state != GradientState::Equal;
        self.gradients.iter().filter(failed).count()
    }

    fn output_line(&self, output: &OutputResult) -> String {
        let OutputResult { name, shape, .. } = output;
        if let Some(tokens) = output.tokens {
            let mut line = format!(
                "{name} {shape:?}: {} tokens, {} different, {} ties",
                tokens.count, tokens.different, tokens.ties
            );
            if let Some(first) = tokens.first_different {
                let _ = write!(line, "; the first is token {first}");
            }
            return line;
        }
        if *shape != output.computed_shape {
            return format!(
                "{name} has shape {shape:?} in the reference, {:?} here",
                output.computed_shape
            );
        }
        let within = if output.passed { "within" } else { "above" };
        format!(
            "{name} {shape:?}: relative error {:.1e}, {within} {:.1e}",
            output.error, self.tolerance
        )
    }

    /// For programs: all outputs and all gradients.
    pub fn json(&self) -> Value {
        // JSON has no infinity.
        let number = |x: f64| x.is_finite().then_some(x);
        let outputs: Vec<Value> = self
            .outputs
            .iter()
            .map(|output| {
                let mut value = json!({
                    "name": output.name,
                    "shape": output.shape,
                    "computed_shape": output.computed_shape,
                    "error": number(output.error),
                    "passed": output.passed,
                });
                if let Some(tokens) = output.tokens {
                    value["tokens"] = tokens.count.into();
                    value["different"] = tokens.different.into();
                    value["ties"] = tokens.ties.into();
                }
                value
            })
            .collect();
        let gradients: Vec<Value> = self
            .gradients
            .iter()
            .map(|gradient| {
                json!({
                    "name": gradient.name,
                    "shape": gradient.shape,
                    "norm": number(gradient.norm),
                    "error": number(gradient.error),
                    "state": state_word(gradient.state),
                    "passed": gradient.state == GradientState::Equal,
                })
            })
            .collect();
        json!({
            "component": self.component.name(),
            "model": self.folder.display().to_string(),
            "adapter": self.adapter.as_ref().map(|path| path.display().to_string()),
            "reference": self.reference.display().to_string(),
            "dtype": self.precision.to_string(),
            "tolerance": self.tolerance,
            "gradient_tolerance": self.gradient_tolerance,
            "passed": self.passed(),
            "outputs": outputs,
            "gradients": gradients,
            "notes": self.notes,
        })
    }
}

fn state_word(state: GradientState) -> &'static str {
    match state {
        GradientState::Equal => "equal",
        GradientState::Different => "different",
        GradientState::Missing => "missing",
        GradientState::Zero => "zero",
        GradientState::Misshapen => "misshapen",
    }
}

fn gradient_line(gradient: &GradientResult) -> String {
    let GradientResult {
        name, error, norm, ..
    } = gradient;
    match gradient.state {
        GradientState::Equal => format!("{error:.1e}  {name}"),
        GradientState::Different => format!("{error:.1e}  {name}, different"),
        GradientState::Missing => {
            format!("{name} has no gradient here; the reference's has norm {norm:.1e}")
        }
        GradientState::Zero => {
            format!("the gradient of {name} is zero here; the reference's has norm {norm:.1e}")
        }
        GradientState::Misshapen => format!(
            "the gradient of {name} has shape {:?} in the reference, not the weight's",
            gradient.shape
        ),
    }
}
