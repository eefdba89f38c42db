use anyhow::Result;
use clap::Args;
use std::process::ExitCode;
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {}
pub(crate) fn main(_options: &Options) -> Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
