//! What is trained, of a command that reads no configuration.

use clap::{ArgAction, Args, ValueEnum};

use crate::data::{DataConfig, Mask, Role, Supervise};

#[derive(Debug, Clone, Args)]
pub(super) struct MaskArgs {
    /// Which turns are trained; `data.supervise` of a configuration.
    #[arg(long, value_enum, default_value_t = Turns::Assistant, value_name = "TURNS")]
    supervise: Turns,
    /// Whose messages are trained, such as `assistant,tool`; `data.mask.roles` of a configuration.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "assistant", value_name = "ROLES")]
    mask_roles: Vec<Speaker>,
    /// Whether thoughts are trained; `data.mask.reasoning` of a configuration.
    #[arg(long, action = ArgAction::Set, default_value_t = true, value_name = "BOOL")]
    mask_reasoning: bool,
    /// Whether calls of tools are trained; `data.mask.tool_calls` of a configuration.
    #[arg(long, action = ArgAction::Set, default_value_t = true, value_name = "BOOL")]
    mask_tool_calls: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Turns {
    Assistant,
    LastTurn,
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Speaker {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

impl MaskArgs {
    /// Puts what is given into a configuration of data, which checks it.
    pub(super) fn apply(&self, data: &mut DataConfig) {
        data.supervise = match self.supervise {
            Turns::Assistant => Supervise::Assistant,
            Turns::LastTurn => Supervise::LastTurn,
            Turns::All => Supervise::All,
        };
        let role = |speaker: &Speaker| match speaker {
            Speaker::System => Role::System,
            Speaker::Developer => Role::Developer,
            Speaker::User => Role::User,
            Speaker::Assistant => Role::Assistant,
            Speaker::Tool => Role::Tool,
        };
        data.mask = Mask {
            roles: self.mask_roles.iter().map(role).collect(),
            reasoning: self.mask_reasoning,
            tool_calls: self.mask_tool_calls,
        };
    }
}
