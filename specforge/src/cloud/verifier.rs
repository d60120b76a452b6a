//! The cloud's side as a state machine: sessions around a target, without a network and without a clock.
//!
//! Messages and times come in, answers are fetched with [`Cloud::take`]. Whatever needs the target waits in a queue for
//! [`Cloud::work`], which makes one pass a call: over a new prompt, or over the trees of all sessions that wait with one. Who
//! drives the machine hears of messages between passes, and never waits for a network within one. A session is with an edge or parked, and verifying or ready; every message that does not fit is
//! refused and changes nothing.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::check;
use super::digest::Digest;
use super::features::Features;
use super::protocol::{
    Address, CloudMessage, Code, Draft, EdgeMessage, Limits, Open, Opened, Refusal, Resume, SessionId, Synced, VERSION,
    Verdict, Wanted,
};
use super::session::{Kept, LinkId, Queued, Round, Session};
use crate::data::ChatTokenizer;
use crate::decode::{EngineOptions, Policy, Proposal, Request, Sequence, SequenceRows};
use crate::error::{Error, Result};
use crate::models::TargetModel;
use crate::tree::TokenTree;

/// What a cloud allows, and what it knows of its target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudSettings {
    /// Tokens that end an answer.
    pub stop_tokens: Vec<u32>,
    /// The tokenizer's `vocabulary_hash`.
    pub tokenizer_hash: String,
    /// Most sessions at a time, the parked ones included.
    pub max_sessions: usize,
    /// Most tokens of all sessions together, each counted with what it may still grow: what their caches may take.
    pub max_tokens: usize,
    /// Most nodes of a tree, its root not counted.
    pub max_nodes: usize,
    /// Most sessions that are verified in one pass; at least 1.
    pub most_together: usize,
    /// How long a session is kept for an edge that is not heard of.
    pub lease: Duration,
    /// After how long without a draft the target goes on by itself, a token at a time; `None` waits.
    pub progress_after: Option<Duration>,
    /// Verdicts that an edge may leave unanswered before the target waits for it.
    pub most_ahead: usize,
}

impl Default for CloudSettings {
    fn default() -> Self {
        Self {
            stop_tokens: Vec::new(),
            tokenizer_hash: String::new(),
            max_sessions: 64,
            max_tokens: 1 << 18,
            max_nodes: 256,
            most_together: 32,
            lease: Duration::from_secs(120),
            progress_after: None,
            most_ahead: 16,
        }
    }
}

/// Tokens of a tail that are checked in one pass: what their rows of logits take is bounded.
const PIECE: usize = 128;

/// What waits for the target.
enum Job {
    Open(LinkId, Box<Open>),
    Verify(SessionId),
}

/// Why something is refused, before it is known of whom.
type Refused = (Code, String);

/// Sessions around a target.
pub struct Cloud<'a> {
    target: &'a dyn TargetModel,
    settings: CloudSettings,
    pub(super) sessions: BTreeMap<SessionId, Session>,
    /// What the target keeps of them.
    pub(super) rows: SequenceRows,
    jobs: VecDeque<Job>,
    answers: VecDeque<(LinkId, CloudMessage)>,
    epoch: u64,
    names: Box<dyn FnMut() -> u128 + Send + 'a>,
}

impl<'a> Cloud<'a> {
    /// A cloud without sessions. Epochs begin behind `epoch`, which is larger after every start; `names` gives names of
    /// sessions, each once, that nobody guesses.
    pub fn new(
        target: &'a dyn TargetModel,
        settings: CloudSettings,
        epoch: u64,
        names: Box<dyn FnMut() -> u128 + Send + 'a>,
    ) -> Self {
        let (sessions, jobs, answers) = (BTreeMap::new(), VecDeque::new(), VecDeque::new());
        Self { target, settings, sessions, rows: SequenceRows::default(), jobs, answers, epoch, names }
    }

    /// A cloud of this process: names that nobody guesses, and epochs that go on behind those of an earlier start.
    pub fn start(target: &'a dyn TargetModel, tokenizer: &ChatTokenizer, settings: CloudSettings) -> Self {
        let settings = CloudSettings {
            stop_tokens: tokenizer.eos_token_ids().to_vec(),
            tokenizer_hash: tokenizer.vocabulary_hash(),
            ..settings
        };
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        // SipHash under a secret of this process.
        let (secret, mut count) = (RandomState::new(), 0u64);
        let names = move || {
            count += 1;
            u128::from(secret.hash_one((count, 0u8))) << 64 | u128::from(secret.hash_one((count, 1u8)))
        };
        Self::new(target, settings, epoch as u64, Box::new(names))
    }

    /// Takes a message in.
    pub fn receive(&mut self, link: LinkId, message: EdgeMessage, now: Duration) {
        match message {
            EdgeMessage::Open(open) => match self.check_open(&open) {
                Ok(()) => self.jobs.push_back(Job::Open(link, open)),
                Err(refused) => self.refuse(link, Address::default(), open.attempt, refused),
            },
            EdgeMessage::Draft(draft) => self.draft(link, draft, now),
            EdgeMessage::Resume(resume) => self.resume(link, resume, now),
            EdgeMessage::Cancel(address) | EdgeMessage::Close(address) => {
                // Who does not hold it any more cannot end it.
                let held = |session: &&Session| session.link == Some(link) && session.address == address;
                if self.sessions.get(&address.session).filter(held).is_some() {
                    self.drop_session(address.session);
                }
            }
        }
    }

    /// Hears that a connection is gone: its sessions are parked.
    pub fn closed(&mut self, link: LinkId) {
        self.jobs.retain(|job| !matches!(job, Job::Open(of, _) if *of == link));
        self.answers.retain(|(to, _)| *to != link);
        for session in self.sessions.values_mut().filter(|session| session.link == Some(link)) {
            session.link = None;
        }
    }

    /// Looks at the clock: lets go of sessions whose lease is over, and goes on by itself where no draft comes.
    pub fn tick(&mut self, now: Duration) {
        let CloudSettings { lease, progress_after, most_ahead, .. } = self.settings;
        let over = |session: &&Session| session.queued.is_none() && now.saturating_sub(session.heard) > lease;
        let ended: Vec<(SessionId, Option<LinkId>, Address)> =
            self.sessions.values().filter(over).map(|of| (of.id(), of.link, of.address)).collect();
        for (id, link, address) in ended {
            self.drop_session(id);
            if let Some(link) = link {
                let message = format!("nothing was heard of the edge for {:.1} s", lease.as_secs_f64());
                self.refuse(link, address, 0, (Code::UnknownSession, message));
            }
        }
        let Some(patience) = progress_after else { return };
        for session in self.sessions.values_mut() {
            let idle = session.link.is_some() && session.queued.is_none() && session.sequence.finish().is_none();
            let late = now.saturating_sub(session.moved.max(session.heard)) >= patience;
            // An edge that does not read is not run away from: what it has not answered is kept, and that is bounded.
            if idle && late && session.kept.len() <= most_ahead {
                session.queued = Some(Queued::nothing(session.sequence.last()));
                self.jobs.push_back(Job::Verify(session.id()));
            }
        }
    }

    /// Makes one pass of the target for whoever has waited longest, and for all who wait for the same kind of pass. Whether
    /// there was anything to do.
    pub fn work(&mut self, now: Duration) -> bool {
        // A session that was cancelled or resumed meanwhile has nothing queued.
        let sessions = &self.sessions;
        let waits = |id: &SessionId| sessions.get(id).is_some_and(|session| session.queued.is_some());
        self.jobs.retain(|job| !matches!(job, Job::Verify(id) if !waits(id)));
        match self.jobs.pop_front() {
            None => return false,
            Some(Job::Open(link, open)) => match self.open(link, &open, now) {
                Ok(opened) => self.answers.push_back((link, CloudMessage::Opened(Box::new(opened)))),
                Err(refused) => self.refuse(link, Address::default(), open.attempt, refused),
            },
            Some(Job::Verify(first)) => self.verify(first, now),
        }
        true
    }

    /// One pass over the trees of a session and of those that wait behind it.
    fn verify(&mut self, first: SessionId, now: Duration) {
        let mut together = vec![first];
        self.jobs.retain(|job| match job {
            Job::Verify(id) if together.len() < self.settings.most_together => {
                together.push(*id);
                false
            }
            _ => true,
        });
        let chosen = self.sessions.values_mut().filter(|session| together.contains(&session.id()));
        let mut rounds: Vec<(&mut Session, Round)> =
            chosen.filter_map(|session| session.take_queued().map(|round| (session, round))).collect();
        let mut wanted: Vec<(&mut Sequence, Proposal)> =
            rounds.iter_mut().map(|(session, round)| (&mut session.sequence, round.guesses.clone())).collect();
        let steps = self.rows.verify(self.target, &mut wanted);
        let mut refused = Vec::new();
        for ((session, round), step) in rounds.into_iter().zip(steps) {
            let (link, address, number) = (session.link, session.address, round.round);
            match (step.and_then(|step| session.verified(round, step, now)), link) {
                (Ok(verdict), Some(link)) => self.answers.push_back((link, CloudMessage::Verdict(verdict))),
                (Err(error), Some(link)) => refused.push((link, address, number, error.to_string())),
                (_, None) => {}
            }
        }
        for (link, address, number, problem) in refused {
            self.refuse(link, address, number, (Code::Target, problem));
        }
    }

    /// Whether something waits for the target.
    pub fn has_work(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// The next answer, and who it is for.
    pub fn take(&mut self) -> Option<(LinkId, CloudMessage)> {
        self.answers.pop_front()
    }

    /// Number of sessions.
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// What a session has decoded so far.
    pub fn sequence(&self, id: SessionId) -> Option<&Sequence> {
        self.sessions.get(&id).map(|session| &session.sequence)
    }

    /// Tokens that the cache of all sessions and of another one may take: a row for each, as long as the longest may grow.
    fn reserved(&self, another: usize) -> usize {
        let longest = self.sessions.values().map(|session| session.sequence.longest()).fold(another, usize::max);
        (self.sessions.len() + 1).saturating_mul(longest)
    }

    fn limits(&self) -> Limits {
        let CloudSettings { max_nodes, max_tokens, lease, .. } = self.settings;
        let context = usize::try_from(self.target.info().max_position_embeddings).unwrap_or(usize::MAX);
        let number = |of: usize| u32::try_from(of).unwrap_or(u32::MAX);
        Limits { max_nodes: number(max_nodes), max_tokens: number(max_tokens.min(context)), lease }
    }

    fn drop_session(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.remove(&id) {
            self.rows.remove(&session.sequence);
        }
        self.jobs.retain(|job| !matches!(job, Job::Verify(of) if *of == id));
    }

    fn refuse(&mut self, link: LinkId, address: Address, of: u64, (code, message): Refused) {
        let refusal = Refusal { address, code, message, of, committed_length: 0, missed: Vec::new() };
        self.answers.push_back((link, CloudMessage::Error(refusal)));
    }

    /// What can be said of a request before the target is asked.
    fn check_open(&self, open: &Open) -> Result<(), Refused> {
        let Open { version, tokenizer_hash, vocab_size, choice, tail, features, .. } = open;
        if *version != VERSION {
            let message = format!("the edge speaks version {version} of the protocol, the cloud version {VERSION}");
            return Err((Code::Version, message));
        }
        if *tokenizer_hash != self.settings.tokenizer_hash {
            let message = "the edge has another tokenizer than the target: its tokens mean something else";
            return Err((Code::Tokenizer, message.to_owned()));
        }
        let info = self.target.info();
        if i64::from(*vocab_size) > info.vocab_size {
            let message = format!("the draft names {vocab_size} tokens, the target has {}", info.vocab_size);
            return Err((Code::Tokenizer, message));
        }
        choice.processors.check().map_err(|problem| (Code::Request, problem))?;
        match choice.policy {
            Policy::Maximal { .. } if !choice.processors.is_greedy() => {
                let message = "the policy `maximal` needs the distributions that guesses were drawn from, which do not \
                               travel; `keyed` is lossless without them";
                return Err((Code::Policy, message.to_owned()));
            }
            policy if !policy.is_lossless() && !tail.is_empty() => {
                let message = "a lossy session cannot be opened anew: what it had committed cannot be checked";
                return Err((Code::Policy, message.to_owned()));
            }
            _ => {}
        }
        if tail.len() > open.max_new_tokens as usize {
            let message = format!("{} tokens are there already, {} are wanted", tail.len(), open.max_new_tokens);
            return Err((Code::Request, message));
        }
        let layers = info.num_layers();
        if let Some(layer) = features.iter().flat_map(|wanted| &wanted.layers).find(|&&layer| layer as usize > layers) {
            let message = format!("the draft reads hidden state {layer}, the target has {layers} layers");
            return Err((Code::Request, message));
        }
        if self.jobs.len() > self.settings.max_sessions.saturating_mul(2) {
            return Err((Code::Busy, "too many requests wait for the target".to_owned()));
        }
        Ok(())
    }

    /// Makes room for a request, at the cost of sessions that nobody holds.
    fn make_room(&mut self, open: &Open) -> Result<(), Refused> {
        let context = self.limits().max_tokens as usize;
        let wanted = (open.prompt.len() + open.max_new_tokens as usize).min(context);
        loop {
            let (sessions, tokens) = (self.sessions.len(), self.reserved(wanted));
            if sessions < self.settings.max_sessions && tokens <= self.settings.max_tokens {
                return Ok(());
            }
            let idle = |session: &&Session| {
                session.queued.is_none() && (session.link.is_none() || session.sequence.finish().is_some())
            };
            let Some(oldest) = self.sessions.values().filter(idle).min_by_key(|session| session.heard) else {
                let message =
                    format!("with {sessions} sessions {tokens} tokens would be held, and none can be let go of");
                return Err((Code::Busy, message));
            };
            let oldest = oldest.id();
            self.drop_session(oldest);
        }
    }

    fn open(&mut self, link: LinkId, open: &Open, now: Duration) -> Result<Opened, Refused> {
        self.make_room(open)?;
        let options = EngineOptions {
            processors: open.choice.processors,
            policy: open.choice.policy,
            stop_tokens: self.settings.stop_tokens.clone(),
            max_rows: 1,
        };
        let request = Request {
            tag: 0,
            prompt: open.prompt.clone(),
            max_new_tokens: open.max_new_tokens as usize,
            key: open.choice.key,
        };
        let capture = open.features.iter().flat_map(|wanted| &wanted.layers).map(|&layer| layer as usize).collect();
        let refuse = |error: Error| match error {
            Error::Torch(_) | Error::Internal { .. } => (Code::Target, error.to_string()),
            _ => (Code::Request, error.to_string()),
        };
        let (mut sequence, step) = self.rows.start(self.target, request, options, capture).map_err(refuse)?;
        let mut features: Vec<Vec<tch::Tensor>> = step.features.into_iter().map(|layer| vec![layer]).collect();
        if let Err(refused) = self.run_tail(&mut sequence, &open.tail, &mut features) {
            self.rows.remove(&sequence);
            return Err(refused);
        }
        let encoded = |wanted: &Wanted| {
            let layers = features.iter().map(|parts| tch::Tensor::f_cat(parts, 0)).collect::<Result<Vec<_>, _>>()?;
            Features::encode(&layers, wanted.encoding)
        };
        let encoded = open.features.as_ref().map(encoded).transpose();
        self.epoch += 1;
        let address = Address { session: SessionId((self.names)()), epoch: self.epoch };
        let digest = Digest::of(sequence.tokens());
        let opened = Opened {
            address,
            attempt: open.attempt,
            tokens: sequence.tokens()[sequence.prompt_length()..].to_vec(),
            digest: digest.bits(),
            finish: sequence.finish(),
            limits: self.limits(),
            lossless: sequence.is_lossless(),
            features: encoded.map_err(|error| (Code::Target, error.to_string()))?,
        };
        let session = Session {
            address,
            edge: open.edge,
            link: Some(link),
            sequence,
            digest,
            encoding: open.features.as_ref().map(|wanted| wanted.encoding),
            heard: now,
            moved: now,
            round: 0,
            kept: VecDeque::new(),
            queued: None,
        };
        self.sessions.insert(address.session, session);
        Ok(opened)
    }

    /// Lets the target decide what an earlier session had committed, as guesses: it must come to the same.
    fn run_tail(
        &mut self,
        sequence: &mut Sequence,
        tail: &[u32],
        features: &mut [Vec<tch::Tensor>],
    ) -> Result<(), Refused> {
        let prompt = sequence.prompt_length();
        loop {
            let got = &sequence.tokens()[prompt..];
            let shared = got.len().min(tail.len());
            let first = (0..shared).find(|&place| got[place] != tail[place]);
            let ended = sequence.finish().is_some() && got.len() < tail.len();
            if let Some(place) = first.or(ended.then_some(shared)) {
                let message = format!("the target chooses another token {place} of the answer than the edge has");
                return Err((Code::Diverged, message));
            }
            if got.len() >= tail.len() {
                return Ok(());
            }
            let end = tail.len().min(got.len() + PIECE.min(sequence.left() - 1));
            let tree = TokenTree::chain(sequence.last(), &tail[got.len()..end]);
            let steps = self.rows.verify(self.target, &mut [(&mut *sequence, Proposal::picked(tree, Vec::new()))]);
            let step = steps.into_iter().next().unwrap_or_else(|| Err(Error::Failed("no verdict came".to_owned())));
            let step = step.map_err(|error| (Code::Target, error.to_string()))?;
            features.iter_mut().zip(step.features).for_each(|(parts, new)| parts.push(new));
        }
    }

    fn draft(&mut self, link: LinkId, draft: Draft, now: Duration) {
        let (vocabulary, most) = (self.target.info().vocab_size, self.settings.max_nodes);
        let Draft { address, round, base_length, base_digest, nodes, sure } = draft;
        let session = match held(&mut self.sessions, link, address) {
            Ok(session) => session,
            Err(refused) => return self.refuse(link, address, round, refused),
        };
        session.heard = now;
        let kept = session.kept.iter().find(|kept| round != 0 && kept.verdict.round == round);
        let answer = match (kept, &session.queued) {
            // A repeat: verified once, answered as often as it is asked.
            (Some(Kept { verdict, nodes: of }), _) if *of == nodes && verdict.base_length == base_length => {
                Ok(CloudMessage::Verdict(Verdict { address: session.address, ..verdict.clone() }))
            }
            (Some(_), _) => Err((Code::RoundReused, format!("round {round} was another draft"))),
            (None, Some(queued)) if queued.round == round && queued.nodes == nodes => return,
            (None, Some(queued)) => Err((Code::InFlight, format!("round {} is being verified", queued.round))),
            (None, None) if !session.agrees(base_length, base_digest) => {
                let (own, message) = (session.length(), "that are not those of the session");
                Err((Code::Diverged, format!("it builds on {base_length} tokens {message}, which has {own}")))
            }
            (None, None) if base_length < session.length() || round <= session.round => {
                session.has(base_length);
                Ok(session.stale(address, round, base_length))
            }
            (None, None) if session.sequence.finish().is_some() => Ok(session.stale(address, round, base_length)),
            (None, None) => match check::tree(session.sequence.last(), &nodes, vocabulary, most) {
                Err(problem) => Err((Code::BadTree, problem.to_string())),
                Ok(tree) => {
                    session.has(base_length);
                    // Of the others nothing is known but that the draft is not sure.
                    let entropy = |node: usize| if sure.contains(&(node as u32)) { 0.0 } else { f64::INFINITY };
                    let entropies = (0..tree.len()).map(entropy).collect();
                    let scores = vec![0.0; tree.len()];
                    let guesses = Proposal::picked(tree, scores).with_entropies(Some(entropies));
                    session.queued = Some(Queued { round, guesses, nodes });
                    self.jobs.push_back(Job::Verify(address.session));
                    return;
                }
            },
        };
        match answer {
            Ok(message) => self.answers.push_back((link, message)),
            Err(refused) => self.refuse(link, address, round, refused),
        }
    }

    fn resume(&mut self, link: LinkId, resume: Resume, now: Duration) {
        let Resume { address, edge, committed_length, digest } = resume;
        let Some(session) = self.sessions.get_mut(&address.session) else {
            let refused = (Code::UnknownSession, "there is no such session".to_owned());
            return self.refuse(link, address, 0, refused);
        };
        // Who holds it may have missed its newest epoch; anybody else has to know it.
        if session.edge != edge && session.address.epoch != address.epoch {
            let refused = (Code::TakenOver, "the session was taken up by another edge".to_owned());
            return self.refuse(link, address, 0, refused);
        }
        if !session.agrees(committed_length, digest) {
            let own = session.length();
            let message =
                format!("the edge has {committed_length} tokens that are not those of the session, which has {own}");
            return self.refuse(link, address, 0, (Code::Diverged, message));
        }
        let Some(missed) = session.missed(committed_length) else {
            let answer = session.stale(address, 0, committed_length);
            return self.answers.push_back((link, answer));
        };
        let before = session.link.replace(link).filter(|before| *before != link);
        let address_before = session.address;
        self.epoch += 1;
        session.address.epoch = self.epoch;
        // The edge drafts anew from where it is; what it had sent before would only be in the way.
        session.queued = None;
        (session.edge, session.heard, session.moved) = (edge, now, now);
        session.has(committed_length);
        let (address, round, committed_length) = (session.address, session.round, session.length());
        let digest = session.digest.bits();
        let missed = missed.into_iter().map(|verdict| Verdict { address, ..verdict }).collect();
        let synced = Synced { address, round, committed_length, digest, missed };
        self.answers.push_back((link, CloudMessage::Synced(synced)));
        if let Some(before) = before {
            let refused = (Code::TakenOver, "the session was taken up by way of another connection".to_owned());
            self.refuse(before, address_before, 0, refused);
        }
    }
}

/// The session that a message is of, if the one who says it holds it.
fn held(sessions: &mut BTreeMap<SessionId, Session>, link: LinkId, address: Address) -> Result<&mut Session, Refused> {
    match sessions.get_mut(&address.session) {
        None => Err((Code::UnknownSession, "there is no such session".to_owned())),
        Some(session) if session.link != Some(link) || session.address != address => {
            Err((Code::TakenOver, "the session was taken up by way of another connection".to_owned()))
        }
        Some(session) => Ok(session),
    }
}
