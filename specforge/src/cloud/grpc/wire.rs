//! Messages on the wire, `proto/cloud.proto`, and what they are here. What arrives is checked for everything that a
//! message must have; what its values mean is checked where they are used.

use std::time::Duration;

use super::messages as wire;
use crate::cloud::features::{Encoding, Features};
use crate::cloud::protocol::{
    Address, Choice, CloudMessage, Code, Draft, EdgeMessage, Limits, Node, Open, Opened, Refusal, Resume, SessionId,
    Synced, Verdict, Wanted,
};
use crate::data::Finish;
use crate::decode::Policy;
use crate::nn::Processors;

/// What is wrong with a message, in words.
type Read<T> = Result<T, String>;

fn there<T>(value: Option<T>, name: &str) -> Read<T> {
    value.ok_or_else(|| format!("`{name}` is missing"))
}

fn write_address(Address { session: SessionId(session), epoch }: Address) -> Option<wire::Address> {
    Some(wire::Address { session_high: (session >> 64) as u64, session_low: session as u64, epoch })
}

fn read_address(address: Option<wire::Address>) -> Read<Address> {
    let wire::Address { session_high, session_low, epoch } = there(address, "address")?;
    let session = SessionId(u128::from(session_high) << 64 | u128::from(session_low));
    Ok(Address { session, epoch })
}

fn write_finish(finish: Option<Finish>) -> i32 {
    let finish = match finish {
        None => wire::Finish::None,
        Some(Finish::Stop) => wire::Finish::Stop,
        Some(Finish::Length) => wire::Finish::Length,
    };
    finish as i32
}

fn read_finish(finish: i32) -> Read<Option<Finish>> {
    match wire::Finish::try_from(finish) {
        Ok(wire::Finish::None) => Ok(None),
        Ok(wire::Finish::Stop) => Ok(Some(Finish::Stop)),
        Ok(wire::Finish::Length) => Ok(Some(Finish::Length)),
        Err(_) => Err(format!("`finish`: {finish} is unknown")),
    }
}

fn write_encoding(encoding: Encoding) -> i32 {
    let encoding = match encoding {
        Encoding::Float32 => wire::Encoding::Float32,
        Encoding::Bfloat16 => wire::Encoding::Bfloat16,
        Encoding::Int8 => wire::Encoding::Int8,
    };
    encoding as i32
}

fn read_encoding(encoding: i32) -> Read<Encoding> {
    match wire::Encoding::try_from(encoding) {
        Ok(wire::Encoding::Float32) => Ok(Encoding::Float32),
        Ok(wire::Encoding::Bfloat16) => Ok(Encoding::Bfloat16),
        Ok(wire::Encoding::Int8) => Ok(Encoding::Int8),
        Ok(wire::Encoding::Unspecified) | Err(_) => Err(format!("`encoding`: {encoding} is unknown")),
    }
}

fn write_features(features: Option<Features>) -> Option<wire::Features> {
    features.map(|Features { encoding, layers, tokens, width, values, scales }| wire::Features {
        encoding: write_encoding(encoding),
        layers,
        tokens,
        width,
        values,
        scales,
    })
}

fn read_features(features: Option<wire::Features>) -> Read<Option<Features>> {
    let read = |wire::Features { encoding, layers, tokens, width, values, scales }| {
        Ok(Features { encoding: read_encoding(encoding)?, layers, tokens, width, values, scales })
    };
    features.map(read).transpose()
}

fn write_choice(Choice { processors, policy, key }: Choice) -> wire::Choice {
    let Processors { temperature, top_k, top_p, repetition_penalty } = processors;
    let policy = Some(match policy {
        Policy::Keyed { seed } => wire::choice::Policy::Keyed(wire::Keyed { seed }),
        Policy::Maximal { seed } => wire::choice::Policy::Maximal(wire::Maximal { seed }),
        Policy::Typical { epsilon, alpha } => wire::choice::Policy::Typical(wire::Typical { epsilon, alpha }),
        Policy::Rank { k, seed } => wire::choice::Policy::Rank(wire::Rank { k: k as u64, seed }),
        Policy::Entropy { most, seed } => wire::choice::Policy::Entropy(wire::Entropy { most, seed }),
    });
    wire::Choice { temperature, top_k: top_k as u64, top_p, repetition_penalty, key, policy }
}

fn read_choice(choice: Option<wire::Choice>) -> Read<Choice> {
    let wire::Choice { temperature, top_k, top_p, repetition_penalty, key, policy } = there(choice, "choice")?;
    let top_k = usize::try_from(top_k).map_err(|_| format!("`top_k`: {top_k} is too large"))?;
    let processors = Processors { temperature, top_k, top_p, repetition_penalty };
    let policy = match there(policy, "policy")? {
        wire::choice::Policy::Keyed(wire::Keyed { seed }) => Policy::Keyed { seed },
        wire::choice::Policy::Maximal(wire::Maximal { seed }) => Policy::Maximal { seed },
        wire::choice::Policy::Typical(wire::Typical { epsilon, alpha }) => Policy::Typical { epsilon, alpha },
        wire::choice::Policy::Rank(wire::Rank { k, seed }) => {
            Policy::Rank { k: usize::try_from(k).map_err(|_| format!("`k`: {k} is too large"))?, seed }
        }
        wire::choice::Policy::Entropy(wire::Entropy { most, seed }) => Policy::Entropy { most, seed },
    };
    Ok(Choice { processors, policy, key })
}

/// A message of the edge's, as it travels.
pub(super) fn write_edge(message: EdgeMessage) -> wire::EdgeMessage {
    use wire::edge_message::Message;
    let message = match message {
        EdgeMessage::Open(open) => Message::Open(write_open(*open)),
        EdgeMessage::Draft(Draft { address, round, base_length, base_digest, nodes, sure }) => {
            Message::Draft(wire::Draft {
                address: write_address(address),
                round,
                base_length,
                base_digest,
                parents: nodes.iter().map(|node| node.parent).collect(),
                tokens: nodes.iter().map(|node| node.token).collect(),
                sure,
            })
        }
        EdgeMessage::Resume(Resume { address, edge, committed_length, digest }) => {
            Message::Resume(wire::Resume { address: write_address(address), edge, committed_length, digest })
        }
        EdgeMessage::Cancel(address) => Message::Cancel(write_address(address).unwrap_or_default()),
        EdgeMessage::Close(address) => Message::Close(write_address(address).unwrap_or_default()),
    };
    wire::EdgeMessage { message: Some(message) }
}

fn write_open(open: Open) -> wire::Open {
    let Open { version, attempt, edge, tokenizer_hash, vocab_size, prompt, tail, choice, max_new_tokens, features } =
        open;
    let features =
        features.map(|Wanted { layers, encoding }| wire::Wanted { layers, encoding: write_encoding(encoding) });
    let choice = Some(write_choice(choice));
    wire::Open { version, attempt, edge, tokenizer_hash, vocab_size, prompt, tail, choice, max_new_tokens, features }
}

/// A message of the edge's that has arrived.
pub(super) fn read_edge(message: wire::EdgeMessage) -> Read<EdgeMessage> {
    use wire::edge_message::Message;
    Ok(match there(message.message, "message")? {
        Message::Open(open) => EdgeMessage::Open(Box::new(read_open(open)?)),
        Message::Draft(wire::Draft { address, round, base_length, base_digest, parents, tokens, sure }) => {
            if parents.len() != tokens.len() {
                return Err(format!("a draft has {} parents and {} tokens", parents.len(), tokens.len()));
            }
            let nodes = parents.into_iter().zip(tokens).map(|(parent, token)| Node { parent, token }).collect();
            let address = read_address(address)?;
            EdgeMessage::Draft(Draft { address, round, base_length, base_digest, nodes, sure })
        }
        Message::Resume(wire::Resume { address, edge, committed_length, digest }) => {
            EdgeMessage::Resume(Resume { address: read_address(address)?, edge, committed_length, digest })
        }
        Message::Cancel(address) => EdgeMessage::Cancel(read_address(Some(address))?),
        Message::Close(address) => EdgeMessage::Close(read_address(Some(address))?),
    })
}

fn read_open(open: wire::Open) -> Read<Open> {
    let wire::Open {
        version,
        attempt,
        edge,
        tokenizer_hash,
        vocab_size,
        prompt,
        tail,
        choice,
        max_new_tokens,
        features,
    } = open;
    let wanted =
        |wire::Wanted { layers, encoding }| Ok::<_, String>(Wanted { layers, encoding: read_encoding(encoding)? });
    let features = features.map(wanted).transpose()?;
    let choice = read_choice(choice)?;
    Ok(Open { version, attempt, edge, tokenizer_hash, vocab_size, prompt, tail, choice, max_new_tokens, features })
}

fn write_verdict(verdict: Verdict) -> wire::Verdict {
    let Verdict { address, round, base_length, tokens, path, unverified, digest, finish, features } = verdict;
    let (address, finish, features) = (write_address(address), write_finish(finish), write_features(features));
    wire::Verdict { address, round, base_length, tokens, path, digest, finish, features, unverified }
}

fn read_verdict(verdict: wire::Verdict) -> Read<Verdict> {
    let wire::Verdict { address, round, base_length, tokens, path, digest, finish, features, unverified } = verdict;
    let (address, finish, features) = (read_address(address)?, read_finish(finish)?, read_features(features)?);
    Ok(Verdict { address, round, base_length, tokens, path, unverified, digest, finish, features })
}

/// Every code with its number.
const CODES: [(Code, wire::Code); 14] = [
    (Code::Version, wire::Code::Version),
    (Code::Tokenizer, wire::Code::Tokenizer),
    (Code::Request, wire::Code::Request),
    (Code::Policy, wire::Code::Policy),
    (Code::Busy, wire::Code::Busy),
    (Code::UnknownSession, wire::Code::UnknownSession),
    (Code::TakenOver, wire::Code::TakenOver),
    (Code::StaleBase, wire::Code::StaleBase),
    (Code::TooFarBehind, wire::Code::TooFarBehind),
    (Code::Diverged, wire::Code::Diverged),
    (Code::RoundReused, wire::Code::RoundReused),
    (Code::InFlight, wire::Code::InFlight),
    (Code::BadTree, wire::Code::BadTree),
    (Code::Target, wire::Code::Target),
];

/// A message of the cloud's, as it travels.
pub(super) fn write_cloud(message: CloudMessage) -> wire::CloudMessage {
    use wire::cloud_message::Message;
    let message = match message {
        CloudMessage::Opened(opened) => {
            let Opened { address, attempt, tokens, digest, finish, limits, lossless, features } = *opened;
            let Limits { max_nodes, max_tokens, lease } = limits;
            let lease_milliseconds = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
            Message::Opened(wire::Opened {
                address: write_address(address),
                attempt,
                tokens,
                digest,
                finish: write_finish(finish),
                limits: Some(wire::Limits { max_nodes, max_tokens, lease_milliseconds }),
                lossless,
                features: write_features(features),
            })
        }
        CloudMessage::Verdict(verdict) => Message::Verdict(write_verdict(verdict)),
        CloudMessage::Synced(Synced { address, round, committed_length, digest, missed }) => {
            let missed = missed.into_iter().map(write_verdict).collect();
            Message::Synced(wire::Synced { address: write_address(address), round, committed_length, digest, missed })
        }
        CloudMessage::Error(Refusal { address, code, message, of, committed_length, missed }) => {
            let number = CODES.iter().find(|(own, _)| *own == code).map_or(0, |(_, number)| *number as i32);
            Message::Error(wire::Refusal {
                address: write_address(address),
                code: number,
                message,
                of,
                committed_length,
                missed: missed.into_iter().map(write_verdict).collect(),
                retryable: code.is_retryable(),
            })
        }
    };
    wire::CloudMessage { message: Some(message) }
}

/// A message of the cloud's that has arrived.
pub(super) fn read_cloud(message: wire::CloudMessage) -> Read<CloudMessage> {
    use wire::cloud_message::Message;
    Ok(match there(message.message, "message")? {
        Message::Opened(opened) => {
            let wire::Opened { address, attempt, tokens, digest, finish, limits, lossless, features } = opened;
            let wire::Limits { max_nodes, max_tokens, lease_milliseconds } = there(limits, "limits")?;
            let lease = Duration::from_millis(lease_milliseconds);
            CloudMessage::Opened(Box::new(Opened {
                address: read_address(address)?,
                attempt,
                tokens,
                digest,
                finish: read_finish(finish)?,
                limits: Limits { max_nodes, max_tokens, lease },
                lossless,
                features: read_features(features)?,
            }))
        }
        Message::Verdict(verdict) => CloudMessage::Verdict(read_verdict(verdict)?),
        Message::Synced(wire::Synced { address, round, committed_length, digest, missed }) => {
            let missed = missed.into_iter().map(read_verdict).collect::<Read<_>>()?;
            CloudMessage::Synced(Synced { address: read_address(address)?, round, committed_length, digest, missed })
        }
        // Whether it can be retried follows from the code.
        Message::Error(wire::Refusal { address, code, message, of, committed_length, missed, retryable: _ }) => {
            let known = CODES.iter().find(|(_, number)| *number as i32 == code);
            let code = known.map(|(code, _)| *code).ok_or_else(|| format!("`code`: {code} is unknown"))?;
            let missed = missed.into_iter().map(read_verdict).collect::<Read<_>>()?;
            let address = read_address(address)?;
            CloudMessage::Error(Refusal { address, code, message, of, committed_length, missed })
        }
    })
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    fn address() -> Address {
        Address { session: SessionId(u128::MAX - 7), epoch: 1 << 40 }
    }

    fn features() -> Option<Features> {
        let (values, scales) = (vec![1, 2, 255, 0], vec![0.5, 2.0]);
        Some(Features { encoding: Encoding::Int8, layers: 1, tokens: 2, width: 2, values, scales })
    }

    fn verdict(finish: Option<Finish>) -> Verdict {
        Verdict {
            address: address(),
            round: 3,
            base_length: 9,
            tokens: vec![5, 0],
            path: vec![0, 2],
            unverified: vec![1],
            digest: u64::MAX,
            finish,
            features: features(),
        }
    }

    #[test]
    fn every_message_survives_the_way() {
        let processors = Processors { temperature: 0.7, top_k: 5, top_p: 0.9, repetition_penalty: 1.1 };
        let policies = [
            Policy::Keyed { seed: 1 },
            Policy::Maximal { seed: 2 },
            Policy::Typical { epsilon: 0.1, alpha: 0.3 },
            Policy::Rank { k: 4, seed: 5 },
            Policy::Entropy { most: 0.5, seed: 6 },
        ];
        let open = |policy| Open {
            version: 1,
            attempt: 2,
            edge: 3,
            tokenizer_hash: "hash".to_owned(),
            vocab_size: 64,
            prompt: vec![0, 1, 63],
            tail: vec![4],
            choice: Choice { processors, policy, key: 8 },
            max_new_tokens: 12,
            features: Some(Wanted { layers: vec![0, 4], encoding: Encoding::Bfloat16 }),
        };
        let nodes = vec![Node { parent: 0, token: 9 }, Node { parent: 1, token: 0 }];
        let draft = Draft { address: address(), round: 7, base_length: 4, base_digest: 5, nodes, sure: vec![2] };
        let resume = Resume { address: address(), edge: 1, committed_length: 2, digest: 3 };
        let mut edges = vec![
            EdgeMessage::Draft(draft),
            EdgeMessage::Resume(resume),
            EdgeMessage::Cancel(address()),
            EdgeMessage::Close(Address::default()),
        ];
        edges.extend(policies.map(|policy| EdgeMessage::Open(Box::new(open(policy)))));
        for message in edges {
            let bytes = write_edge(message.clone()).encode_to_vec();
            assert_eq!(read_edge(wire::EdgeMessage::decode(&bytes[..]).unwrap()).unwrap(), message);
        }
        let opened = Opened {
            address: address(),
            attempt: 2,
            tokens: vec![0, 0],
            digest: 6,
            finish: Some(Finish::Length),
            limits: Limits { max_nodes: 1, max_tokens: 2, lease: Duration::from_millis(1500) },
            lossless: true,
            features: None,
        };
        let missed = vec![verdict(None), verdict(Some(Finish::Stop))];
        let (round, committed_length, digest) = (4, 5, 6);
        let mut clouds = vec![
            CloudMessage::Opened(Box::new(opened)),
            CloudMessage::Verdict(verdict(None)),
            CloudMessage::Synced(Synced {
                address: address(),
                round,
                committed_length,
                digest,
                missed: missed.clone(),
            }),
        ];
        clouds.extend(CODES.map(|(code, _)| {
            let (address, message, missed) = (address(), "why".to_owned(), missed.clone());
            CloudMessage::Error(Refusal { address, code, message, of: 9, committed_length, missed })
        }));
        for message in clouds {
            let bytes = write_cloud(message.clone()).encode_to_vec();
            assert_eq!(read_cloud(wire::CloudMessage::decode(&bytes[..]).unwrap()).unwrap(), message);
        }
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        use wire::edge_message::Message;
        let read = |message| read_edge(wire::EdgeMessage { message }).unwrap_err();
        assert!(read(None).contains("`message`"));
        let draft = wire::Draft { parents: vec![0], ..wire::Draft::default() };
        assert!(read(Some(Message::Draft(draft))).contains("1 parents and 0 tokens"));
        assert!(read(Some(Message::Resume(wire::Resume::default()))).contains("`address`"));
        assert!(read(Some(Message::Open(wire::Open::default()))).contains("`choice`"));
        let refusal = wire::Refusal { code: 99, ..wire::Refusal::default() };
        let message = Some(wire::cloud_message::Message::Error(refusal));
        assert!(read_cloud(wire::CloudMessage { message }).unwrap_err().contains("99 is unknown"));
    }
}
