//! `specforge doctor`

use std::path::{Path, PathBuf};

use clap::Args;

use super::devices::DeviceArgs;
use super::hub::{self, Place};
use super::{Output, machine, note, numbers};
use crate::config::Dtype;
use crate::data::Message;
use crate::doctor::{self, Case, Decoding, Prices, acceptance, report};
use crate::error::{Error, Result};
use crate::eval::acceptance::questions;
use crate::export::Engine;
use crate::hub::Wanted;

#[derive(Debug, Clone, Args)]
pub(super) struct DoctorArgs {
    /// Model folder, or name on a hub. With --draft: say what is wrong with the draft beside it, what its guesses are worth, and how engines
    /// are started with it.
    #[arg(long, value_name = "DIR", requires = "draft")]
    target: Option<PathBuf>,
    /// Folder of an exported or published draft, or its name on a hub.
    #[arg(long, value_name = "DIR", requires = "target")]
    draft: Option<PathBuf>,
    /// The engine that shall serve it, as `export --engine` takes it: what it cannot serve is a fault. Without it, what none
    /// can.
    #[arg(long, requires = "draft")]
    engine: Option<Engine>,
    /// The checkpoint or run that the draft was written from, where the record beside the draft does not name it.
    #[arg(long, value_name = "DIR", requires = "draft")]
    checkpoint: Option<PathBuf>,
    /// Questions to decode beside the built-in ones: JSON Lines as `eval` reads them. May be given several times.
    #[arg(long, num_args = 1.., value_name = "FILE", requires = "draft")]
    data: Vec<PathBuf>,
    /// Only the first questions of each file.
    #[arg(long, default_value_t = 8, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    limit: usize,
    /// The report.json of `eval --out DIR --tree chain:N`, whose figures decide the number of guesses.
    #[arg(long, value_name = "FILE", requires = "draft")]
    report: Option<PathBuf>,
    /// Look at the files alone.
    #[arg(long, requires = "draft")]
    no_decode: bool,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 64, allow_hyphen_values = true, value_parser = numbers::at_least(2usize))]
    max_new_tokens: usize,
    /// Element type of target and draft: float32, bfloat16 or float16. Without it float32 on the CPU, and that of the
    /// target's files on CUDA.
    #[arg(long, requires = "draft")]
    dtype: Option<Dtype>,
    #[command(flatten)]
    devices: DeviceArgs,
}

pub(super) fn run(args: &DoctorArgs, output: &Output) -> Result<()> {
    let args = &mut args.clone();
    let models = [(&mut args.target, Wanted::Target), (&mut args.draft, Wanted::Draft)];
    let models = models.into_iter().filter_map(|(path, wanted)| Some(Place::Model(path.as_mut()?, wanted)));
    hub::fetch(models.chain(args.data.iter_mut().map(Place::Data)).collect(), None)?;
    let args = &*args;
    match (&args.target, &args.draft) {
        (Some(target), Some(draft)) => examine(args, (target, draft), output),
        _ => machine::run(output),
    }
}

fn examine(args: &DoctorArgs, (path, draft): (&Path, &Path), output: &Output) -> Result<()> {
    let prices = args.report.as_deref().map(Prices::of_report).transpose()?;
    let devices = args.devices.alone()?;
    let dtype = Dtype::of_target(args.dtype, path, devices.home)?;
    let target = devices.load(path, dtype.kind())?;
    let case = Case::open(draft, (path, target.as_ref()), args.checkpoint.as_deref(), args.engine)?;
    let decoding = match (&case.target.tokenizer, args.no_decode) {
        (Ok(tokenizer), false) => {
            let mut asked: Vec<Vec<Message>> =
                acceptance::PROMPTS.iter().map(|prompt| vec![Message::new("user", *prompt)]).collect();
            for question in
                if args.data.is_empty() { Vec::new() } else { questions::read(&args.data, Some(args.limit))? }
            {
                let mut messages = question.before;
                messages.extend(question.turns.first().map(|turn| Message::new("user", turn.as_str())));
                asked.push(messages);
            }
            // A template that does not render is a finding.
            Decoding::of(tokenizer, &asked, args.max_new_tokens)
                .inspect_err(|error| note(format!("warning: nothing is decoded: {error}")))
                .ok()
        }
        _ => None,
    };
    let diagnosis = doctor::examine(&case, decoding.as_ref(), prices)?;
    output.result(&diagnosis, || report::text(&diagnosis));
    match diagnosis.faults {
        0 => Ok(()),
        1 => Err(Error::Failed(format!("{}: 1 fault", draft.display()))),
        faults => Err(Error::Failed(format!("{}: {faults} faults", draft.display()))),
    }
}
