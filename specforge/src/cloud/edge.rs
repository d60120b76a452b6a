//! The edge's side as a state machine: a draft, and the beginning of the answer that is known here.
//!
//! [`Edge::next_message`] says what is to be sent, [`Edge::received`] takes in what comes. Verdicts are taken by the place they begin
//! at: what is known already is compared and passed over, what leaves a gap makes the edge resume. Nothing is committed that
//! the cloud has not said, and every digest is compared.

use std::time::Duration;

use tch::{Device, Kind, Tensor};

use super::digest::Digest;
use super::drafting::{Ahead, Drafting};
use super::features::{Encoding, Features};
use super::pace::{Pace, surest};
use super::protocol::{
    Address, Choice, CloudMessage, Code, Draft, EdgeMessage, Node, Open, Opened, Refusal, Resume, Synced, VERSION,
    Verdict, Wanted,
};
use crate::data::Finish;
use crate::decode::engine::RoundOutcome;
use crate::decode::{Drafter, Policy, Proposal};
use crate::error::{Error, Result};

/// A request of an edge.
#[derive(Debug, Clone)]
pub struct EdgeRequest {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Most tokens of the answer.
    pub max_new_tokens: usize,
    /// How the target chooses.
    pub choice: Choice,
    /// The tokenizer's `vocabulary_hash`.
    pub tokenizer_hash: String,
    /// Tokens that the draft can name.
    pub vocab_size: u32,
    /// How features travel, where the draft reads any.
    pub encoding: Encoding,
    /// Element type and device of the draft.
    pub options: (Kind, Device),
    /// Whether to guess on while a verdict travels.
    pub ahead: bool,
    /// What is known of rounds, by which the number of guesses is chosen; without it everything that the draft guesses is
    /// sent.
    pub pace: Option<Pace>,
    /// How often in a row something may go wrong without a token in between.
    pub patience: u32,
    /// Names this edge; another one for each that runs.
    pub edge: u64,
}

/// What an edge does next, or waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// There is no connection.
    Offline,
    /// A session has to be opened.
    ToOpen,
    /// `Opened` is on its way.
    Opening,
    /// The session has to be taken up again.
    ToResume,
    /// `Synced` is on its way.
    Resuming,
    /// It is the draft's turn.
    Drafting,
    /// The verdict of a round is on its way; of any where it is 0.
    Waiting(u64),
    /// The answer has ended, and the cloud is to be told.
    ToClose,
    /// The answer has ended.
    Done,
}

/// What a verdict is to what is known.
enum Taken {
    New,
    Known,
    Gap,
}

/// One answer, drafted here and verified elsewhere.
pub struct Edge<'a> {
    request: EdgeRequest,
    drafting: Drafting<'a>,
    state: State,
    /// Everything known to be committed, the prompt first.
    committed: Vec<u32>,
    digest: Digest,
    address: Option<Address>,
    attempt: u64,
    round: u64,
    /// What is on its way.
    sent: Option<(Draft, Proposal)>,
    /// Most nodes of a tree, as the cloud allows.
    max_nodes: usize,
    /// Most tokens in all.
    end: usize,
    finish: Option<Finish>,
    lossless: bool,
    troubles: u32,
    /// Whether the cloud asked to be left alone for a while.
    is_busy: bool,
    rounds: Vec<RoundOutcome>,
    /// Places in the answer of tokens that the target would not have chosen.
    unverified: Vec<usize>,
    /// The time, as the driver says it; when the draft on its way was sent, and how long it took to make.
    now: Duration,
    sent_at: Duration,
    drafting_time: Duration,
    /// Sessions opened, and resumed.
    sessions: (u64, u64),
}

impl<'a> Edge<'a> {
    /// An edge that has not said anything yet.
    pub fn new(request: EdgeRequest, drafter: Box<dyn Drafter + 'a>) -> Self {
        let committed = request.prompt.clone();
        let (digest, end) = (Digest::of(&committed), committed.len() + request.max_new_tokens);
        Self {
            drafting: Drafting::new(drafter, &request.choice),
            state: State::Offline,
            committed,
            digest,
            address: None,
            attempt: 0,
            round: 0,
            sent: None,
            max_nodes: usize::MAX,
            end,
            finish: None,
            lossless: request.choice.policy.is_lossless(),
            troubles: 0,
            is_busy: false,
            rounds: Vec::new(),
            unverified: Vec::new(),
            now: Duration::ZERO,
            sent_at: Duration::ZERO,
            drafting_time: Duration::ZERO,
            sessions: (0, 0),
            request,
        }
    }

    /// An edge that takes a session over from another one that is not there any more: where it is, and the answer so far.
    pub fn taking_over(request: EdgeRequest, drafter: Box<dyn Drafter + 'a>, address: Address, answer: &[u32]) -> Self {
        let mut edge = Self::new(request, drafter);
        edge.committed.extend(answer);
        edge.digest.extend(answer);
        edge.address = Some(address);
        edge
    }

    /// There is a connection.
    pub fn connected(&mut self) {
        self.state = match (self.finish, self.address) {
            (Some(_), _) => State::Done,
            (None, Some(_)) => State::ToResume,
            (None, None) => State::ToOpen,
        };
    }

    /// The connection is gone, or nothing was heard for too long.
    pub fn disconnected(&mut self, why: &str) -> Result<()> {
        if self.finish.is_some() {
            self.state = State::Done;
            return Ok(());
        }
        self.state = State::Offline;
        self.trouble(why)
    }

    /// Where it is.
    pub fn state(&self) -> State {
        self.state
    }

    /// Everything committed, the prompt first.
    pub fn committed(&self) -> &[u32] {
        &self.committed
    }

    /// The answer so far.
    pub fn answer(&self) -> &[u32] {
        &self.committed[self.request.prompt.len()..]
    }

    /// Why the answer has ended, if it has.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// Whether the answer is the target's own.
    pub fn is_lossless(&self) -> bool {
        self.lossless
    }

    /// Places in the answer of tokens that a lossy gate let pass and that the target, asked afterwards, would not have chosen.
    pub fn unverified(&self) -> &[usize] {
        &self.unverified
    }

    /// Verdicts on the edge's own drafts.
    pub fn rounds(&self) -> &[RoundOutcome] {
        &self.rounds
    }

    /// What guessing ahead was worth.
    pub fn ahead(&self) -> Ahead {
        self.drafting.counts
    }

    /// Sessions that were opened, and how often one was taken up again.
    pub fn sessions(&self) -> (u64, u64) {
        self.sessions
    }

    /// Where its session is.
    pub fn address(&self) -> Option<Address> {
        self.address
    }

    /// Hears what time it is: asked before and after what takes some.
    pub fn at(&mut self, now: Duration) {
        self.now = now;
    }

    /// A draft was made in the time from `begun` until now, and is on its way.
    pub fn drafted(&mut self, begun: Duration, now: Duration) {
        (self.now, self.sent_at, self.drafting_time) = (now, now, now.saturating_sub(begun));
    }

    /// What is known of rounds.
    pub fn pace(&self) -> Option<&Pace> {
        self.request.pace.as_ref()
    }

    /// What is to be sent now; nothing while something is waited for.
    pub fn next_message(&mut self) -> Result<Option<EdgeMessage>> {
        match self.state {
            State::ToOpen => {
                self.attempt += 1;
                self.state = State::Opening;
                Ok(Some(EdgeMessage::Open(Box::new(self.open()))))
            }
            State::ToResume => {
                self.state = State::Resuming;
                let address = self.address.unwrap_or_default();
                let (committed_length, digest) = (self.committed.len() as u64, self.digest.bits());
                Ok(Some(EdgeMessage::Resume(Resume { address, edge: self.request.edge, committed_length, digest })))
            }
            State::Drafting => self.draft().map(|draft| Some(EdgeMessage::Draft(draft))),
            State::ToClose => {
                self.state = State::Done;
                Ok(self.address.map(EdgeMessage::Close))
            }
            State::Offline | State::Opening | State::Resuming | State::Waiting(_) | State::Done => Ok(None),
        }
    }

    /// How often in a row something went wrong, and whether the cloud has no room at the moment: what waits of a driver grow
    /// with. Asking takes the second back.
    pub fn troubles(&mut self) -> (u32, bool) {
        (self.troubles, std::mem::take(&mut self.is_busy))
    }

    /// Guesses on while a verdict travels. Whether there was anything to guess.
    pub fn go_ahead(&mut self) -> Result<bool> {
        match (&self.sent, self.state) {
            (Some((_, proposal)), State::Waiting(_)) if self.request.ahead => {
                self.drafting.go_ahead(&self.committed, proposal, self.left())
            }
            _ => Ok(false),
        }
    }

    /// The answer is not wanted any more: what is to be said to the cloud, if it knows of it.
    pub fn cancel(&mut self) -> Option<EdgeMessage> {
        let is_known = !matches!(self.state, State::Offline | State::Done);
        self.state = State::Done;
        self.address.filter(|_| is_known).map(EdgeMessage::Cancel)
    }

    fn left(&self) -> usize {
        self.end.saturating_sub(self.committed.len())
    }

    fn open(&self) -> Open {
        let EdgeRequest { prompt, choice, tokenizer_hash, vocab_size, encoding, edge, .. } = &self.request;
        let layers: Vec<u32> = self.drafting.capture().iter().map(|&layer| layer as u32).collect();
        Open {
            version: VERSION,
            attempt: self.attempt,
            edge: *edge,
            tokenizer_hash: tokenizer_hash.clone(),
            vocab_size: *vocab_size,
            prompt: prompt.clone(),
            tail: self.answer().to_vec(),
            choice: *choice,
            max_new_tokens: u32::try_from(self.request.max_new_tokens).unwrap_or(u32::MAX),
            features: (!layers.is_empty()).then_some(Wanted { layers, encoding: *encoding }),
        }
    }

    fn draft(&mut self) -> Result<Draft> {
        let guesses = self.request.pace.as_ref().map_or(usize::MAX, |pace| pace.guesses(usize::MAX));
        let deepest = self.request.pace.as_ref().map_or(usize::MAX, |pace| pace.depth(guesses));
        let depth = self.left().saturating_sub(1).min(deepest);
        let proposal = surest(self.drafting.propose(&self.committed, depth)?, guesses.min(self.max_nodes));
        let (tree, parents) = (&proposal.tree, proposal.tree.topology().parents());
        let nodes =
            (1..tree.len()).map(|node| Node { parent: parents[node] as u32, token: tree.tokens()[node] }).collect();
        let sure = match self.request.choice.policy {
            Policy::Entropy { most, .. } => proposal.sure(most).map(|node| node as u32).collect(),
            _ => Vec::new(),
        };
        self.round += 1;
        let draft = Draft {
            address: self.address.unwrap_or_default(),
            round: self.round,
            base_length: self.committed.len() as u64,
            base_digest: self.digest.bits(),
            nodes,
            sure,
        };
        self.sent = Some((draft.clone(), proposal));
        self.state = State::Waiting(self.round);
        Ok(draft)
    }

    /// Takes in what the cloud says. An error is the end of the answer.
    pub fn received(&mut self, message: CloudMessage) -> Result<()> {
        match message {
            CloudMessage::Opened(opened) => self.opened(*opened),
            CloudMessage::Verdict(verdict) => self.verdict(&verdict),
            CloudMessage::Synced(synced) => self.synced(&synced),
            CloudMessage::Error(refusal) => self.refused(&refusal),
        }
    }

    fn opened(&mut self, opened: Opened) -> Result<()> {
        if self.state != State::Opening || opened.attempt != self.attempt {
            return Ok(()); // of an attempt that was given up
        }
        let Opened { address, tokens, digest, finish, limits, lossless, features, .. } = opened;
        let known = self.answer().len();
        // Of an answer of one token the new session may know no more than that.
        if tokens.get(..known) != Some(self.answer()) || tokens.is_empty() {
            return Err(diverged("a session that was opened anew begins otherwise"));
        }
        self.commit(&tokens[known..], digest)?;
        let count = self.committed.len() - 1;
        let features = self.features(features.as_ref(), count)?;
        self.drafting.begin(&self.committed, features)?;
        (self.address, self.lossless) = (Some(address), lossless);
        self.max_nodes = limits.max_nodes as usize;
        self.end = self.end.min(limits.max_tokens as usize);
        self.sessions.0 += 1;
        (self.sent, self.troubles, self.finish) = (None, 0, finish);
        self.state = if finish.is_some() { State::ToClose } else { State::Drafting };
        Ok(())
    }

    /// The features that the draft reads of so many tokens, `[T, H]` each.
    fn features(&self, features: Option<&Features>, tokens: usize) -> Result<Vec<Tensor>> {
        let layers = self.drafting.capture().len();
        match features {
            _ if layers == 0 => Ok(Vec::new()),
            Some(features) => features.decode(layers, tokens, self.request.options),
            None => Err(Error::Failed("the cloud sent no features, which the draft reads".to_owned())),
        }
    }

    fn is_own(&self, address: Address) -> bool {
        self.address.is_some_and(|own| own.session == address.session)
    }

    fn verdict(&mut self, verdict: &Verdict) -> Result<()> {
        if !self.is_own(verdict.address) || matches!(self.state, State::ToClose | State::Done) {
            return Ok(());
        }
        let taken = self.take(verdict)?;
        self.state = match (self.state, taken) {
            _ if self.finish.is_some() => State::ToClose,
            (State::Waiting(_), Taken::Gap) => State::ToResume,
            (State::Waiting(round), Taken::New | Taken::Known) if verdict.round == round => State::Drafting,
            (State::Waiting(0), Taken::New) => State::Drafting,
            (state, _) => state,
        };
        Ok(())
    }

    /// Writes tokens down, if the cloud's digest of everything committed is then the edge's.
    fn commit(&mut self, fresh: &[u32], digest: u64) -> Result<()> {
        let mut grown = self.digest;
        grown.extend(fresh);
        if grown.bits() != digest {
            return Err(diverged("the digest of what is committed is another one in the cloud"));
        }
        self.committed.extend(fresh);
        self.digest = grown;
        Ok(())
    }

    /// Commits what a verdict says behind what is known.
    fn take(&mut self, verdict: &Verdict) -> Result<Taken> {
        let known = self.committed.len() as u64;
        if verdict.base_length > known {
            return Ok(Taken::Gap);
        }
        let base = verdict.base_length as usize;
        let shared = (self.committed.len() - base).min(verdict.tokens.len());
        if self.committed[base..base + shared] != verdict.tokens[..shared] {
            return Err(diverged("a verdict says something else of tokens that are committed"));
        }
        if verdict.end() <= known {
            return Ok(Taken::Known);
        }
        if shared > 0 || verdict.path.len() != verdict.tokens.len() {
            return Err(diverged("a verdict does not fit what is committed"));
        }
        let features = self.features(verdict.features.as_ref(), verdict.tokens.len())?;
        self.commit(&verdict.tokens, verdict.digest)?;
        let first = base - self.request.prompt.len();
        self.unverified.extend(verdict.unverified.iter().map(|&place| first + place as usize));
        self.drafting.committed(&self.committed, verdict.tokens.len(), features)?;
        if let Some((_, proposal)) = self.sent.take_if(|(draft, _)| draft.round == verdict.round) {
            let (tree, topology) = (&proposal.tree, proposal.tree.topology());
            let (guesses, depth) = (topology.len() - 1, topology.depth());
            let was_guessed = |(&node, &token): (&u32, &u32)| tree.child(node as usize, token).is_some();
            let accepted = verdict.path.iter().zip(&verdict.tokens).filter(|&pair| was_guessed(pair)).count();
            self.rounds.push(RoundOutcome { guesses, depth, tokens: verdict.tokens.len(), accepted });
            if let Some(pace) = &mut self.request.pace {
                let kept: Vec<usize> = verdict.path.iter().skip(1).map(|&node| node as usize).collect();
                pace.round(&proposal, guesses, &kept, [self.drafting_time, self.now.saturating_sub(self.sent_at)]);
            }
        }
        (self.sent, self.troubles, self.finish) = (None, 0, verdict.finish);
        Ok(Taken::New)
    }

    fn synced(&mut self, synced: &Synced) -> Result<()> {
        if self.state != State::Resuming || !self.is_own(synced.address) {
            return Ok(());
        }
        if !self.drafting.has_begun() {
            if !self.drafting.capture().is_empty() {
                // Features of what was committed before come with a session that is opened anew.
                (self.address, self.state) = (None, State::ToOpen);
                return Ok(());
            }
            self.drafting.begin(&self.committed, Vec::new())?;
        }
        self.address = Some(synced.address);
        self.round = self.round.max(synced.round);
        self.sessions.1 += 1;
        self.take_missed(&synced.missed)?;
        // A verdict that was sent later may have come before this: each was compared by its own digest.
        let (length, digest) = (self.committed.len() as u64, self.digest.bits());
        let is_behind = length < synced.committed_length;
        if is_behind || (length == synced.committed_length && digest != synced.digest) {
            return Err(diverged("the cloud has other tokens than those it has said"));
        }
        self.sent = None;
        self.state = if self.finish.is_some() { State::ToClose } else { State::Drafting };
        Ok(())
    }

    fn take_missed(&mut self, missed: &[Verdict]) -> Result<()> {
        for verdict in missed {
            if matches!(self.take(verdict)?, Taken::Gap) {
                return Err(diverged("the cloud left out tokens of what was missed"));
            }
        }
        Ok(())
    }

    fn refused(&mut self, refusal: &Refusal) -> Result<()> {
        let is_current = match self.state {
            State::Opening => refusal.of == self.attempt && refusal.address == Address::default(),
            State::Offline | State::Done | State::ToClose => false,
            // What is said to an older epoch is an answer to a repeat that the network made.
            _ => self.address == Some(refusal.address),
        };
        if !is_current {
            return Ok(());
        }
        let of_the_round = matches!(self.state, State::Waiting(round) if round == refusal.of);
        match refusal.code {
            Code::StaleBase => {
                self.take_missed(&refusal.missed)?;
                if self.finish.is_some() {
                    self.state = State::ToClose;
                } else if of_the_round {
                    self.state = State::Drafting;
                    self.trouble(&refusal.message)?;
                }
            }
            Code::UnknownSession | Code::TooFarBehind => {
                self.address = None;
                self.state = State::ToOpen;
                self.trouble(&refusal.message)?;
            }
            // The cloud goes on by itself just now; its verdict comes.
            Code::InFlight if of_the_round => self.state = State::Waiting(0),
            Code::InFlight => {}
            Code::Busy => {
                self.state = State::ToOpen;
                self.is_busy = true;
                self.trouble(&refusal.message)?;
            }
            // A repeat that the network made of something older.
            Code::RoundReused | Code::Diverged if matches!(self.state, State::Waiting(_)) && !of_the_round => {}
            code => return Err(Error::Failed(format!("the cloud refuses ({code:?}): {}", refusal.message))),
        }
        Ok(())
    }

    /// Notes that something went wrong, and gives up where it has too often.
    fn trouble(&mut self, why: &str) -> Result<()> {
        self.troubles += 1;
        if self.troubles <= self.request.patience {
            return Ok(());
        }
        let times = self.troubles;
        Err(Error::Failed(format!("no token came from the cloud in {times} attempts; the last one: {why}")))
    }

    /// Gives the draft back, for another answer.
    pub fn into_drafter(self) -> Box<dyn Drafter + 'a> {
        self.drafting.into_drafter()
    }

    /// Its draft.
    #[cfg(test)]
    pub(super) fn drafting(&self) -> &Drafting<'a> {
        &self.drafting
    }
}

fn diverged(what: &str) -> Error {
    Error::Failed(format!("edge and cloud disagree: {what}; nothing of it was taken over"))
}
