//! From a policy, JSON in the format of seccompiler, to programs for the kernel. The build script does
//! it with the policy of this repository, and the program with one that it is given.

use std::collections::{BTreeMap, HashMap};

use seccompiler::{BpfProgram, TargetArch};
use serde_json::{Map, Value};

/// The main thread's filter until a guest runs. The policy lists what only a start needs: the rest is
/// what the threads need that come after it, since a filter lasts, and is inherited.
pub const START: &str = "start";
/// The main thread's filter from then on.
pub const EVENT_LOOP: &str = "event_loop";
/// That of a virtual processor's thread.
pub const VCPU: &str = "vcpu";
/// That of the API's thread.
pub const API: &str = "api";
/// System calls that are answered with an error, on the main thread and those that it makes.
pub const REFUSED: &str = "refused";

/// All of them.
pub const NAMES: [&str; 5] = [START, EVENT_LOOP, VCPU, API, REFUSED];

/// What is wrong with a policy.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Not JSON.
    #[error("not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// Not the filters that there are threads for.
    #[error("there must be the filters {}, and no others", NAMES.join(", "))]
    Names,
    /// Not a filter of rules.
    #[error("{0}: not a filter with rules")]
    Shape(String),
    /// Rules of which one makes the other pointless.
    #[error("{filter}: {call} is there twice")]
    Twice {
        /// Where.
        filter: String,
        /// The system call.
        call: String,
    },
    /// Something else that the compiler does not like.
    #[error("{0}")]
    Compiler(#[from] seccompiler::Error),
}

/// One filter's rules, by system call, in the order in which they are asked. Each is the arguments
/// that it allows, or none where it allows all.
type Rules = BTreeMap<String, Vec<Option<Value>>>;

/// The programs of a policy, by the names of its filters.
pub fn compile(policy: &[u8]) -> Result<HashMap<String, BpfProgram>, PolicyError> {
    let mut policy: Map<String, Value> = serde_json::from_slice(policy)?;
    if policy.len() != NAMES.len() || !NAMES.iter().all(|name| policy.contains_key(*name)) {
        return Err(PolicyError::Names);
    }
    let rules = |name: &str| {
        let entries = policy.get(name).and_then(|filter| filter.get("filter")?.as_array());
        rules(name, entries.ok_or_else(|| PolicyError::Shape(name.to_owned()))?)
    };
    // The processors' first: their rules are asked most often.
    let mut all = rules(VCPU)?;
    let others = [rules(EVENT_LOOP)?, rules(START)?];
    for name in [API, REFUSED] {
        rules(name)?;
    }
    for (call, arguments) in others.into_iter().flatten() {
        join(all.entry(call).or_default(), arguments);
    }
    let entries = all.into_iter().flat_map(|(call, arguments)| {
        arguments.into_iter().map(move |arguments| match arguments {
            Some(arguments) => serde_json::json!({ "syscall": call, "args": arguments }),
            None => serde_json::json!({ "syscall": call }),
        })
    });
    let entries = entries.collect();
    if let Some(start) = policy.get_mut(START).and_then(Value::as_object_mut) {
        start.insert("filter".to_owned(), entries);
    }
    let text = serde_json::to_vec(&policy)?;
    Ok(seccompiler::compile_from_json(&*text, TargetArch::x86_64)?)
}

fn rules(filter: &str, entries: &[Value]) -> Result<Rules, PolicyError> {
    let mut rules = Rules::new();
    for entry in entries {
        let shape = || PolicyError::Shape(filter.to_owned());
        let call = entry.get("syscall").and_then(Value::as_str).ok_or_else(shape)?;
        let arguments = entry.get("args").map(without_comments);
        let known = rules.entry(call.to_owned()).or_default();
        // For the compiler the rule with arguments would count and the other would not.
        let all = |arguments: &Option<Value>| arguments.is_none();
        if known.contains(&arguments)
            || known.iter().any(all)
            || (!known.is_empty() && all(&arguments))
        {
            return Err(PolicyError::Twice { filter: filter.to_owned(), call: call.to_owned() });
        }
        known.push(arguments);
    }
    Ok(rules)
}

/// What either allows.
fn join(known: &mut Vec<Option<Value>>, more: Vec<Option<Value>>) {
    for arguments in more {
        if !known.contains(&arguments) {
            known.push(arguments);
        }
    }
    if known.contains(&None) {
        *known = vec![None];
    }
}

/// Conditions as they are compared: a comment makes no difference.
fn without_comments(arguments: &Value) -> Value {
    let mut arguments = arguments.clone();
    for condition in arguments.as_array_mut().into_iter().flatten() {
        if let Some(condition) = condition.as_object_mut() {
            condition.remove("comment");
        }
    }
    arguments
}
