//! Edge and cloud over a network that loses, delays, doubles and reorders messages, cuts connections, and whose ends are
//! killed and started anew: for every schedule of faults the answer is the target's own, or there is a clear error.
//!
//! Everything is keyed by a seed and runs in virtual time: a schedule that fails is a number.

use std::collections::BTreeMap;
use std::time::Duration;

use super::protocol::{Choice, CloudMessage, EdgeMessage, SessionId};
use super::transport::{Link, Received, Waits, drive};
use super::{Cloud, CloudSettings, Edge, EdgeRequest, LinkId, Pace, features};
use crate::decode::drafter::{Context, Drafter, Joining, Plain, Progress, PromptLookup, last};
use crate::decode::event::Silent;
use crate::decode::{Engine, EngineOptions, Finish, Policy, Proposal, Request};
use crate::error::{Error, Result};
use crate::models::TargetModel;
use crate::models::llama::{LlamaConfig, LlamaTarget};
use crate::nn::Processors;
use crate::nn::noise::{self, keyed_stream};
use crate::tree::TokenTree;
use tch::{Device, Kind};

mod caches;
mod directed;
mod drafts;
mod schedules;

const HASH: &str = "the target's tokenizer";
const STOP: [u32; 2] = [7, 8];
const MS: Duration = Duration::from_millis(1);

/// One layer, 32 tokens, float64: no batch shape flips a choice. The head is peaky enough for texts to repeat themselves.
fn target(seed: u64) -> LlamaTarget {
    let config: LlamaConfig = serde_json::from_value(serde_json::json!({
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 32, "max_position_embeddings": 64,
    }))
    .unwrap();
    let mut stream = 0;
    let mut tensor = |name: &str, shape: &[i64]| {
        stream += 1;
        let random = noise::normal(shape, 0.4, seed, stream).to_kind(Kind::Double);
        Ok(match name {
            "lm_head.weight" => random * 3.0,
            name if name.ends_with("norm.weight") => random + 1.0,
            _ => random,
        })
    };
    LlamaTarget::build(config, &mut tensor).unwrap()
}

/// What a schedule asks for.
#[derive(Debug, Clone)]
struct Asked {
    prompt: Vec<u32>,
    max_new_tokens: usize,
    temperature: f64,
    key: u64,
}

impl Asked {
    fn of(dice: &mut dyn FnMut() -> u64) -> Self {
        let length = 1 + dice() % 6;
        let prompt = (0..length).map(|_| (dice() % 32) as u32).collect();
        let max_new_tokens = 1 + dice() as usize % 16;
        Self { prompt, max_new_tokens, temperature: [0.0, 1.0][dice() as usize % 2], key: dice() % 5 }
    }

    fn choice(&self) -> Choice {
        let processors = Processors::at_temperature(self.temperature);
        Choice { processors, policy: Policy::Keyed { seed: 3 }, key: self.key }
    }

    fn request(&self, edge: u64, ahead: bool) -> EdgeRequest {
        EdgeRequest {
            prompt: self.prompt.clone(),
            max_new_tokens: self.max_new_tokens,
            choice: self.choice(),
            tokenizer_hash: HASH.to_owned(),
            vocab_size: 32,
            encoding: features::Encoding::Float32,
            options: (Kind::Double, Device::Cpu),
            ahead,
            pace: edge.is_multiple_of(2).then(Pace::default),
            patience: 30,
            edge,
        }
    }

    /// What the target says alone.
    fn alone(&self, target: &dyn TargetModel) -> (Vec<u32>, Finish) {
        let Choice { processors, policy, key } = self.choice();
        let options = EngineOptions { processors, policy, stop_tokens: STOP.to_vec(), max_rows: 1 };
        let mut engine = Engine::new(target, Box::new(Plain), options).unwrap();
        let (prompt, max_new_tokens) = (self.prompt.clone(), self.max_new_tokens);
        engine.submit(Request { tag: 0, prompt, max_new_tokens, key }).unwrap();
        let decoded = engine.run(&mut Silent).unwrap().remove(0).decoded.unwrap();
        (decoded.tokens, decoded.finish)
    }
}

/// Guesses trees of any shape, right or wrong as the dice fall: it knows the answer.
struct Oracle {
    text: Vec<u32>,
    dice: Box<dyn FnMut() -> u64>,
    most: u64,
}

impl Oracle {
    fn new(asked: &Asked, answer: &[u32], seed: u64, most: u64) -> Self {
        Self { text: [&asked.prompt[..], answer].concat(), dice: Box::new(keyed_stream(seed, 11)), most }
    }
}

impl Drafter for Oracle {
    fn join(&mut self, _rows: &[Joining<'_>]) -> Result<()> {
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let row = rows[0];
        let mut tree = TokenTree::root(last(row.tokens));
        let mut scores = vec![0.0];
        let is_right = self.text.starts_with(row.tokens);
        let mut node = 0;
        for _ in 0..(self.dice)() % (self.most + 1) {
            let parent = if (self.dice)().is_multiple_of(4) { (self.dice)() as usize % tree.len() } else { node };
            let place = row.tokens.len() + tree.topology().depths()[parent];
            let guess = match (self.dice)() % 4 {
                0 => ((self.dice)() % 32) as u32,
                _ if is_right => self.text.get(place).copied().unwrap_or(0),
                _ => 1,
            };
            node = tree.push(parent, guess);
            scores.resize(tree.len(), scores[parent] - 1.0);
        }
        Ok(vec![Proposal::picked(tree, scores)])
    }

    fn commit(&mut self, _rows: &[Progress<'_>]) -> Result<()> {
        Ok(())
    }

    fn retain(&mut self, _rows: &[usize]) {}

    fn can_rewind(&self) -> bool {
        true
    }

    fn rewind(&mut self, _lengths: &[usize]) -> Result<()> {
        Ok(())
    }
}

/// How likely what goes wrong, in thousandths: of a message, or of an event.
#[derive(Debug, Clone, Copy, Default)]
struct Rates {
    lost: u64,
    doubled: u64,
    late: u64,
    cut: u64,
    cloud_killed: u64,
    edge_killed: u64,
    evicted: u64,
    slow: u64,
}

enum Event {
    ToCloud(LinkId, EdgeMessage),
    ToEdge(LinkId, CloudMessage),
    Gone(LinkId),
}

/// A network with a cloud behind it, seen from an edge.
struct Network<'t> {
    target: &'t dyn TargetModel,
    settings: CloudSettings,
    cloud: Cloud<'t>,
    starts: u64,
    now: Duration,
    events: BTreeMap<(Duration, u64), Event>,
    count: u64,
    /// The connection at hand, and whether it is there.
    link: LinkId,
    is_open: bool,
    rates: Rates,
    dice: Box<dyn FnMut() -> u64>,
    killed: bool,
    /// Messages to the edge: seen by tests.
    said: Vec<CloudMessage>,
}

fn settings() -> CloudSettings {
    CloudSettings {
        stop_tokens: STOP.to_vec(),
        tokenizer_hash: HASH.to_owned(),
        max_sessions: 4,
        max_tokens: 400,
        max_nodes: 24,
        most_together: 8,
        lease: Duration::from_secs(30),
        progress_after: None,
        most_ahead: 4,
    }
}

fn cloud(target: &dyn TargetModel, settings: CloudSettings, starts: u64) -> Cloud<'_> {
    let mut names = keyed_stream(starts, 12);
    Cloud::new(target, settings, starts << 32, Box::new(move || (u128::from(names()) << 64) | u128::from(names())))
}

impl<'t> Network<'t> {
    fn new(target: &'t dyn TargetModel, settings: CloudSettings, rates: Rates, seed: u64) -> Self {
        Self {
            target,
            cloud: cloud(target, settings.clone(), 1),
            settings,
            starts: 1,
            now: Duration::ZERO,
            events: BTreeMap::new(),
            count: 0,
            link: LinkId(0),
            is_open: false,
            rates,
            dice: Box::new(keyed_stream(seed, 13)),
            killed: false,
            said: Vec::new(),
        }
    }

    fn happens(&mut self, thousandths: u64) -> bool {
        thousandths > 0 && (self.dice)() % 1000 < thousandths
    }

    fn after(&mut self, delay: Duration, event: Event) {
        self.count += 1;
        self.events.insert((self.now + delay, self.count), event);
    }

    /// Puts a message on its way, once, twice or not at all, and later than others where the dice say so.
    fn carry(&mut self, make: &dyn Fn() -> Event) {
        let copies = 1 + u64::from(self.happens(self.rates.doubled)) - u64::from(self.happens(self.rates.lost));
        for _ in 0..copies {
            let late = if self.happens(self.rates.late) { (self.dice)() % 900 } else { 0 };
            let delay = 5 + (self.dice)() % 5 + late;
            self.after(delay as u32 * MS, make());
        }
    }

    fn cut(&mut self) {
        self.is_open = false;
        let link = self.link;
        let delay = (self.dice)() % 200;
        self.after(delay as u32 * MS, Event::Gone(link));
    }

    fn restart_cloud(&mut self) {
        self.starts += 1;
        self.cloud = cloud(self.target, self.settings.clone(), self.starts);
        self.is_open = false;
    }

    fn evict(&mut self) {
        let now = self.now;
        let lease = self.settings.lease;
        self.cloud.tick(now + lease + MS);
    }

    /// The cloud hears a message, works, and answers.
    fn deliver(&mut self, link: LinkId, message: EdgeMessage) {
        // What an older connection still carries comes through where the cloud has not heard of its end.
        self.cloud.receive(link, message, self.now);
        if self.happens(self.rates.cloud_killed) {
            return self.restart_cloud();
        }
        self.run_cloud();
        if self.happens(self.rates.evicted) {
            self.evict();
        }
        if self.happens(self.rates.cloud_killed) {
            self.restart_cloud();
        }
    }

    fn run_cloud(&mut self) {
        self.cloud.tick(self.now);
        while self.cloud.work(self.now) {}
        while let Some((link, message)) = self.cloud.take() {
            self.said.push(message.clone());
            self.carry(&|| Event::ToEdge(link, message.clone()));
        }
    }
}

impl Link for Network<'_> {
    fn connect(&mut self) -> Result<(), String> {
        if self.is_open {
            self.cut();
        }
        self.link.0 += 1;
        if self.happens(self.rates.cut) {
            return Err("nobody answers".to_owned());
        }
        self.is_open = true;
        Ok(())
    }

    fn send(&mut self, message: EdgeMessage) -> Result<(), String> {
        if self.happens(self.rates.edge_killed) {
            self.killed = true;
            return Ok(());
        }
        if !self.is_open {
            return Err("the connection is gone".to_owned());
        }
        let link = self.link;
        self.carry(&|| Event::ToCloud(link, message.clone()));
        if self.happens(self.rates.cut) {
            self.cut();
        }
        Ok(())
    }

    fn receive(&mut self, patience: Duration) -> Received {
        let until = self.now + patience;
        if self.happens(self.rates.slow) {
            self.pause(2500 * MS);
        }
        let mut next_tick = self.now + 50 * MS;
        loop {
            let due = self.events.first_key_value().map_or(until, |((time, _), _)| *time);
            if self.settings.progress_after.is_some() && next_tick < due.min(until) {
                self.now = self.now.max(next_tick);
                next_tick += 50 * MS;
                self.run_cloud();
                continue;
            }
            if due > until || self.events.is_empty() {
                self.now = self.now.max(until);
                return if self.is_open { Received::Nothing } else { Received::Closed("the line is cut".to_owned()) };
            }
            let Some(((time, _), event)) = self.events.pop_first() else { continue };
            self.now = self.now.max(time);
            match event {
                Event::ToCloud(link, message) => self.deliver(link, message),
                Event::Gone(link) => self.cloud.closed(link),
                Event::ToEdge(link, message) if link == self.link && self.is_open => {
                    if self.happens(self.rates.cut) {
                        self.cut();
                    }
                    return Received::Message(message);
                }
                Event::ToEdge(..) => {}
            }
            if !self.is_open {
                return Received::Closed("the line is cut".to_owned());
            }
        }
    }

    fn now(&self) -> Duration {
        self.now
    }

    fn pause(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(((due, _), _)) = self.events.first_key_value() {
            if *due > until {
                break;
            }
            let Some(((time, number), event)) = self.events.pop_first() else { break };
            self.now = self.now.max(time);
            match event {
                Event::ToCloud(link, message) => self.deliver(link, message),
                Event::Gone(link) => self.cloud.closed(link),
                // The edge does not read: it finds the message later.
                event => {
                    self.events.insert((until + MS, number), event);
                }
            }
        }
        self.now = self.now.max(until);
        if self.settings.progress_after.is_some() {
            self.run_cloud();
        }
    }
}

fn waits() -> Waits {
    Waits { answer: 1500 * MS, first_pause: 20 * MS, longest_pause: 400 * MS }
}

/// Most of virtual time that an answer may take: more is a machine that hangs.
const LONGEST: Duration = Duration::from_secs(3600);

/// Runs an answer to its end over a network; an edge that is killed is started anew, with nothing but the request.
fn answer<'d>(
    network: &mut Network<'_>,
    asked: &Asked,
    ahead: bool,
    drafter: &mut dyn FnMut(u64) -> Box<dyn Drafter + 'd>,
) -> Result<(Vec<u32>, Finish)> {
    for life in 1.. {
        let mut edge = Edge::new(asked.request(life, ahead), drafter(life));
        network.killed = false;
        let killed = std::cell::Cell::new(false);
        let outcome = {
            let mut watched = Watched { network: &mut *network, killed: &killed };
            drive(&mut edge, &mut watched, &waits(), &|| killed.get(), &mut |_| Ok(()))
        };
        assert!(network.now < LONGEST, "an answer took {:?}", network.now);
        if killed.get() {
            network.cut();
            continue;
        }
        outcome?;
        let finish = edge.finish().ok_or_else(|| Error::Failed("the edge ended without an end".to_owned()))?;
        return Ok((edge.answer().to_vec(), finish));
    }
    unreachable!()
}

/// A network whose edge may be killed.
struct Watched<'n, 't> {
    network: &'n mut Network<'t>,
    killed: &'n std::cell::Cell<bool>,
}

impl Link for Watched<'_, '_> {
    fn connect(&mut self) -> Result<(), String> {
        self.network.connect()
    }

    fn send(&mut self, message: EdgeMessage) -> Result<(), String> {
        if self.killed.get() {
            return Ok(()); // the dead say nothing
        }
        let sent = self.network.send(message);
        self.killed.set(self.network.killed);
        sent
    }

    fn receive(&mut self, patience: Duration) -> Received {
        if self.killed.get() { Received::Nothing } else { self.network.receive(patience) }
    }

    fn pause(&mut self, time: Duration) {
        self.network.pause(time);
    }

    fn now(&self) -> Duration {
        self.network.now
    }
}
