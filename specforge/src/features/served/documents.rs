//! Documents on their way to servers. Where servers give different parts of the states, each part is asked for on its own.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

use tch::Tensor;

use super::server::Server;
use super::{Asking, Engine, Part, ServerAddress, Shape, failed, sglang, vllm};
use crate::data::PackedBatch;
use crate::error::{Error, Result, foreign};
use crate::serving::{Cause, Fleet, Http, Outcome, Pool, Trouble, patiently};

/// Servers that give states.
struct Servers(Vec<Server>);

/// A part of the states of one document.
struct Question {
    name: String,
    ids: Vec<i64>,
    part: Part,
}

impl Fleet for Servers {
    type Question = Question;
    type Answer = Vec<Tensor>;

    fn servers(&self) -> usize {
        self.0.len()
    }

    fn suits(&self, server: usize, question: &Question) -> bool {
        self.0[server].part == question.part
    }

    fn ask(&self, server: usize, question: &Question) -> Result<Vec<Tensor>, Trouble> {
        let server = &self.0[server];
        match server.address.engine {
            Engine::Vllm => vllm::states(server, &question.ids),
            Engine::Sglang => sglang::states(server, &question.ids),
        }
    }
}

/// All documents that are on their way, and who is asked.
pub(super) struct Documents {
    servers: Arc<Servers>,
    pool: Pool<Servers>,
    /// Parts that make the states of a document, in this order.
    parts: Vec<Part>,
}

impl Documents {
    /// Asks each server what it serves, and begins.
    pub(super) fn begin(
        servers: &[ServerAddress],
        asking: &Asking,
        key: impl Fn(Engine) -> Option<String>,
        shape: Shape,
    ) -> Result<Self> {
        let mut known = Vec::new();
        for address in servers {
            let key = key(address.engine);
            let key = (address.engine.key_variable(), key.as_deref());
            let http = Http::new(&address.url, key, asking.timeout, asking.in_flight);
            let model = known_of(address, asking, "does not say what it serves", || model(&http))?;
            let part = match address.engine {
                Engine::Vllm => Part::All,
                Engine::Sglang => known_of(address, asking, "gives no states", || sglang::part(&http, shape))?,
            };
            let (address, states_folder, width) = (address.clone(), asking.states_folder.clone(), shape.width);
            known.push(Server { address, http, model, part, width, timeout: asking.timeout, states_folder });
        }
        let parts = parts(&known, shape)?;
        let servers = Arc::new(Servers(known));
        let pool = Pool::start(Arc::clone(&servers), asking.retries(), asking.in_flight)?;
        Ok(Self { servers, pool, parts })
    }

    /// Documents that are on their way at once.
    pub(super) fn in_flight(&self) -> usize {
        self.pool.in_flight()
    }

    /// Asks for the states of one document.
    pub(super) fn ask(&self, document: &PackedBatch) -> Answer {
        let wanted = Arc::new(());
        let name = document.documents.first().map_or_else(String::new, |document| document.name.clone());
        let mut arrive = Vec::new();
        for &part in &self.parts {
            let (answer, arrives) = mpsc::channel();
            arrive.push(arrives);
            self.pool.ask([Question { name: name.clone(), ids: document.ids.clone(), part }], &answer, &wanted);
        }
        Answer { arrive, servers: Arc::clone(&self.servers), _wanted: wanted }
    }
}

/// States on their way, part by part.
pub(super) struct Answer {
    arrive: Vec<Receiver<Outcome<Servers>>>,
    servers: Arc<Servers>,
    _wanted: Arc<()>,
}

impl Answer {
    /// Waits for the states of the document, and says who gave them.
    pub(super) fn wait(self) -> Result<(String, Vec<Tensor>)> {
        let (mut names, mut states) = (Vec::new(), Vec::new());
        for part in self.arrive {
            let gone = |_| Error::Failed("the threads that ask servers are gone".to_owned());
            let Outcome { question, server, attempts, result } = part.recv().map_err(gone)?;
            let address = &self.servers.0[server].address;
            let more = result.map_err(|failure| {
                let problem = match failure.cause {
                    Cause::Question | Cause::Refused => failure.problem,
                    Cause::Answers | Cause::Servers => {
                        format!("asked {attempts} times without an answer, the last time: {}", failure.problem)
                    }
                };
                let Question { name, ids, .. } = question;
                failed(address, &format!("document `{}` ({} tokens): {problem}", foreign::name(&name), ids.len()))
            })?;
            names.push(address.to_string());
            states.extend(more);
        }
        Ok((names.join(" and "), states))
    }
}

/// Which parts make the states of a document, from servers that give these. One that nobody needs is a mistake.
fn parts(servers: &[Server], shape: Shape) -> Result<Vec<Part>> {
    let gives = |part: Part| servers.iter().any(|server| server.part == part);
    let needed = match (gives(Part::All), shape.layers) {
        (true, _) => vec![Part::All],
        (false, 1) => vec![Part::Final],
        (false, _) => vec![Part::Others, Part::Final],
    };
    if let Some(surplus) = servers.iter().find(|server| !needed.contains(&server.part)) {
        let problem = match surplus.part {
            Part::Others => "gives states beside the final one, and none are wanted",
            _ => "is of another kind than the others; name servers of one kind",
        };
        return Err(failed(&surplus.address, problem));
    }
    let lacking = match needed.iter().find(|&&part| !gives(part)) {
        None => return Ok(needed),
        Some(Part::Others) => "--enable-return-aux-hidden-states, which gives the states beside the final one",
        Some(_) => "--enable-return-hidden-states alone, which gives final states",
    };
    Err(Error::Usage(format!(
        "--from: name a server, too, that was started with {lacking}: one SGLang server does not give both (docs/capture.md)"
    )))
}

/// What a server calls its model.
fn model(http: &Http) -> Result<String, Trouble> {
    let models = http.get("/v1/models")?;
    let model = models.pointer("/data/0/id").and_then(serde_json::Value::as_str);
    model.map(str::to_owned).ok_or_else(|| Trouble::Final("/v1/models names no model".to_owned()))
}

/// What a server says about itself, as soon as it says something.
fn known_of<T>(
    address: &ServerAddress,
    asking: &Asking,
    what: &str,
    ask: impl Fn() -> Result<T, Trouble>,
) -> Result<T> {
    patiently(asking.retries(), ask)
        .map_err(|(times, trouble)| failed(address, &format!("{what} (asked {times} times): {}", trouble.problem())))
}
