//! The table of cases: what is asked, by how many, of which fleet, and what it may cost.

use crate::canned::{Era, LARGE};
use crate::load::Want;
use crate::request::Ask;
use crate::stage::Fleet;

const CONNECTIONS: [usize; 3] = [1, 16, 64];
/// The number of connections used where only one is.
pub(crate) const USUAL: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Small,
    Large,
    List,
}

#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) title: String,
    pub(crate) client: Era,
    pub(crate) fleet: Fleet,
    pub(crate) work: Work,
    pub(crate) connections: usize,
    /// The CPU ratio to the blind proxy we want to stay below.
    pub(crate) aim: Option<f64>,
}

/// Every case, those with the same fleet next to each other; `quick` keeps about a third.
pub(crate) fn all(quick: bool) -> Vec<Case> {
    let mut cases = Vec::new();
    for era in [Era::Modern, Era::Legacy] {
        let few = fleet(era, 1, 10);
        each(&mut cases, few, era, Work::Small, Some(1.5));
        each(&mut cases, few, era, Work::Large, Some(1.4));
        each(&mut cases, few, era, Work::List, None);
        cases.push(Case::new(few, era.other(), Work::Small, USUAL, None));
        each(&mut cases, fleet(era, 1, 100), era, Work::List, None);
        each(&mut cases, fleet(era, 1, 1000), era, Work::List, None);
    }
    each(
        &mut cases,
        Fleet { hidden: 100, ..fleet(Era::Modern, 1, 1000) },
        Era::Modern,
        Work::List,
        Some(0.5),
    );
    each(&mut cases, Fleet { hidden: 2, ..fleet(Era::Modern, 50, 20) }, Era::Modern, Work::List, Some(0.5));
    cases.retain(|case| !quick || (case.connections == USUAL && case.fleet.tools != 100));
    cases
}

pub(crate) fn fleet(era: Era, upstreams: usize, tools: usize) -> Fleet {
    Fleet { era, upstreams, tools, hidden: 0 }
}

fn each(cases: &mut Vec<Case>, fleet: Fleet, client: Era, work: Work, aim: Option<f64>) {
    cases.extend(CONNECTIONS.map(|connections| Case::new(fleet, client, work, connections, aim)));
}

// === impl Case ===

impl Case {
    pub(crate) fn new(fleet: Fleet, client: Era, work: Work, connections: usize, aim: Option<f64>) -> Case {
        let what = match work {
            Work::Small => "small call".to_owned(),
            Work::Large => "100 KiB result".to_owned(),
            Work::List if fleet.hidden == 0 => format!("list of {} tools", fleet.visible()),
            Work::List => {
                format!("filtered list of {} tools ({} × {})", fleet.visible(), fleet.upstreams, fleet.tools)
            }
        };
        let eras = match client == fleet.era {
            true => client.to_string(),
            false => format!("{client} client, {} upstream", fleet.era),
        };
        Case { title: format!("{what}, {eras}"), client, fleet, work, connections, aim }
    }

    /// What the `index`th connection asks for: connections spread over the upstreams.
    pub(crate) fn ask(&self, index: usize) -> Ask {
        self.work.ask(&self.fleet, index)
    }

    pub(crate) fn want(&self) -> Want {
        self.work.want(&self.fleet)
    }
}

// === impl Work ===

impl Work {
    pub(crate) fn ask(self, fleet: &Fleet, index: usize) -> Ask {
        match self {
            Work::Small => Ask::Call(Fleet::exposed(index % fleet.upstreams, 0)),
            Work::Large => Ask::Call(Fleet::exposed(index % fleet.upstreams, 1)),
            Work::List => Ask::List,
        }
    }

    fn want(self, fleet: &Fleet) -> Want {
        match self {
            Work::Small => Want::Text { at_least: 1 },
            Work::Large => Want::Text { at_least: LARGE },
            Work::List => Want::Tools(fleet.visible()),
        }
    }
}
