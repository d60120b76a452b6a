//! `specforge regen --from`: servers answer.

use std::time::Duration;

use clap::Args;

use super::super::{LazyProgress, Output, note, numbers};
use super::{RegenArgs, all_answered, told};
use crate::data::ChatTokenizer;
use crate::decode::regenerate::GenerationConfig;
use crate::decode::regenerate::served::{self, Addresses, Sampling, ServedOptions, ServedReport};
use crate::error::{Error, Result, foreign};
use crate::serving::Retries;
use crate::stop::{Answer, Stop};

#[derive(Debug, Clone, Args)]
pub(super) struct ServedArgs {
    /// Ask servers that speak OpenAI's protocol instead of running the target: vllm:URL, sglang:URL, or openai:URL for any
    /// other, such as vllm:http://127.0.0.1:8000. Several, separated by commas, or given several times, share the rows.
    #[arg(long, value_name = "ENGINE:URL", conflicts_with_all = ["device", "target_devices"])]
    from: Vec<Addresses>,
    /// What the servers call the model; asked of them where it is not given.
    #[arg(long, value_name = "NAME", requires = "from")]
    model: Option<String>,
    /// Environment variable that holds the servers' key: VLLM_API_KEY, SGLANG_API_KEY or OPENAI_API_KEY where it is not
    /// given.
    #[arg(long, value_name = "VARIABLE", requires = "from")]
    api_key_env: Option<String>,
    /// Turns on their way to one server at once.
    #[arg(long, default_value_t = 32, requires = "from", allow_hyphen_values = true,
          value_parser = numbers::at_least(1usize))]
    concurrency: usize,
    /// Seconds that one answer may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 1800, requires = "from", allow_hyphen_values = true,
          value_parser = numbers::at_least(1u64))]
    timeout: u64,
    /// How often a turn is asked again before its row fails; in between it waits, longer each time, up to a minute, or as
    /// long as the server says.
    #[arg(long, default_value_t = 9, requires = "from", allow_hyphen_values = true,
          value_parser = numbers::at_least(0u32))]
    retries: u32,
}

impl ServedArgs {
    /// Whether servers answer.
    pub(super) fn is_given(&self) -> bool {
        !self.from.is_empty()
    }
}

pub(super) fn run(args: &RegenArgs, stop: &Stop, output: &Output) -> Result<()> {
    let (tokenizer, sampling) = target(args)?;
    let ServedArgs { from, model, api_key_env, concurrency, timeout, retries } = &args.served;
    let options = ServedOptions {
        servers: from.clone(),
        model: model.clone(),
        key_variable: api_key_env.clone(),
        in_flight: *concurrency,
        timeout: Duration::from_secs(*timeout),
        retries: Retries {
            attempts: retries.saturating_add(1),
            first_pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(60),
        },
        prompts: args.prompts.clone(),
        out: args.out.clone(),
        max_new_tokens: args.max_new_tokens,
        sampling,
        template_arguments: args.template.arguments()?,
        on_length: args.on_length(),
        seed: args.seed,
        max_bad_share: args.max_bad_share,
        restart: args.restart,
    };
    options.check()?;
    let environment = |name: &str| std::env::var(name).ok();
    if let Some(variable) = api_key_env.as_deref().filter(|name| environment(name).is_none_or(|key| key.is_empty())) {
        return Err(Error::Usage(format!("--api-key-env: the environment variable {variable} holds no key")));
    }
    stop.set_answer(Answer::Finish(
        "stopping; answered rows stay, and the same command goes on from them; what is on its way is asked again",
    ));
    let progress = LazyProgress::new("regen", "rows");
    let answer = |options: &ServedOptions| {
        served::run(options, tokenizer.as_ref(), &environment, stop.arrived(), &mut |state| {
            let message = format!("{:.0} tokens/s, {} failed", state.tokens_per_second, state.failed);
            progress.set_with(state.done as u64, state.total as u64, &message);
        })
    };
    if args.dry_run {
        let estimate = args.estimate(tokenizer.as_ref(), &mut |prompts, out| {
            let (prompts, out) = (prompts.to_path_buf(), out.to_path_buf());
            let report = answer(&ServedOptions { prompts, out, restart: false, ..options.clone() })?;
            match report.ended_by {
                Some(problem) => Err(Error::Failed(problem)),
                None => Ok((report.answers, report.new_tokens, report.tokens_per_second)),
            }
        })?;
        return told(&estimate, None, output);
    }
    let report = answer(&options)?;
    report.warnings.iter().for_each(|line| note(format!("warning: {line}")));
    report.skipped.iter().for_each(|line| note(format!("warning: skipped {line}")));
    progress.finish(if report.interrupted { "stopped; run the same command again to go on" } else { "done" });
    output.result(&report, || text(&report));
    match report.ended_by {
        Some(problem) => Err(Error::Failed(problem)),
        None => all_answered(report.failed, report.errors.as_deref()),
    }
}

/// The tokenizer of the target and how it wants to be sampled, where one is named. What was given goes first.
fn target(args: &RegenArgs) -> Result<(Option<ChatTokenizer>, Sampling)> {
    let Some(target) = &args.target else {
        return match args.template.names_a_file() {
            true => Err(Error::Usage(
                "--chat-template: servers go by their own; name --target, too, to hold what they answer to this one"
                    .to_owned(),
            )),
            false => Ok((None, args.sampling())),
        };
    };
    let own = GenerationConfig::read(target)?;
    own.warnings.iter().for_each(|line| note(format!("warning: {line}")));
    Ok((Some(args.template.tokenizer(target)?), args.sampling().over(own.processors).into()))
}

fn text(report: &ServedReport) -> String {
    let dropped = match report.dropped {
        0 => String::new(),
        dropped => format!(", {dropped} rows left out"),
    };
    let called = match report.called_tools {
        0 => String::new(),
        called => format!(", {called} called tools"),
    };
    let mut text = format!(
        "{}: {} rows answered by `{}` ({} before this run), {} answers, {} ended by themselves{called}{dropped}\n\
         {} new tokens, {:.0} tokens/s; token ids of {} answers",
        foreign::path(&report.out),
        report.answered,
        foreign::name(&report.model),
        report.answered_before,
        report.answers,
        report.stopped,
        report.new_tokens,
        report.tokens_per_second,
        report.with_token_ids,
    );
    if report.servers.len() > 1 {
        for server in &report.servers {
            text.push_str(&format!("\n  {}: {} answers, {} tokens", server.server, server.answers, server.new_tokens));
        }
    }
    text
}
