//! The average of the weights over the last part of a session, which is better than the weights of any one step.

use candle_core::{Tensor, Var};

use crate::Result;

/// γ + 1 of the power function average of Karras et al. 2024 (arXiv 2312.02696, section 3.1), whose decay at step t is
/// (1 − 1/t)^(γ + 1): with γ = 16 it spans about the last tenth of the steps so far, however many these are.
const EXPONENT: i32 = 17;

/// Running averages of some variables.
pub struct Average {
    variables: Vec<Var>,
    means: Vec<Tensor>,
    steps: u64,
}

impl Average {
    /// The averages before the first step: the variables as they are.
    pub fn new(variables: &[(String, Var)]) -> Result<Self> {
        let variables: Vec<Var> = variables.iter().map(|(_, v)| v.clone()).collect();
        Ok(Self {
            means: values(&variables)?,
            variables,
            steps: 0,
        })
    }

    /// Takes in the variables after one more step.
    pub fn follow(&mut self) -> Result<()> {
        self.steps += 1;
        let kept = (1.0 - 1.0 / self.steps as f64).powi(EXPONENT);
        for (mean, variable) in self.means.iter_mut().zip(&self.variables) {
            let now = variable.as_tensor().detach();
            *mean = ((&*mean * kept)? + (now * (1.0 - kept))?)?;
        }
        Ok(())
    }

    /// Calls `body` while the variables hold their averages.
    pub fn lend(&self, body: impl FnOnce() -> Result<()>) -> Result<()> {
        let own = values(&self.variables)?;
        for (variable, mean) in self.variables.iter().zip(&self.means) {
            variable.set(mean)?;
        }
        let result = body();
        for (variable, own) in self.variables.iter().zip(&own) {
            variable.set(own)?;
        }
        result
    }
}

/// Copies of the values of `variables`.
fn values(variables: &[Var]) -> Result<Vec<Tensor>> {
    let copies = variables.iter().map(|v| v.as_tensor().copy());
    Ok(copies
        .map(|copy| copy.map(|c| c.detach()))
        .collect::<candle_core::Result<_>>()?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn the_average_trails_and_is_lent_for_a_while_only() {
        let variable = Var::new(0f32, &Device::Cpu).unwrap();
        let value = || variable.as_tensor().to_scalar::<f32>().unwrap();
        let mut average = Average::new(&[("x".into(), variable.clone())]).unwrap();
        for step in 1..=1000 {
            let now = Tensor::new(step as f32, &Device::Cpu).unwrap();
            variable.set(&now).unwrap();
            average.follow().unwrap();
        }
        average
            .lend(|| {
                assert!((940.0..950.0).contains(&value()), "{}", value());
                Ok(())
            })
            .unwrap();
        assert_eq!(value(), 1000.0);
    }
}
