//! Who answers a request to a model: tables and a crowd of entry nodes.

use std::collections::BTreeMap;

use leasehold_proto::base::dice::Dice;
use leasehold_proto::base::id::{Hash, KeyId};
use leasehold_proto::base::money::Amount;
use leasehold_proto::base::time::{Boot, Span};
use leasehold_proto::minds::route::{Host, Lack, Nobody, Question, Router, Sort, Wanted, Went};
use leasehold_proto::words::contract::Class;
use leasehold_proto::words::model::{Endpoint, ModelOffer, ModelState, ModelTerms, TokenRates};

fn offer(price: u64) -> ModelOffer {
    let rates = TokenRates { prompt: Amount(price), completion: Amount(price * 4) };
    ModelOffer {
        terms: ModelTerms { name: "m".into(), digest: Hash([1; 32]), rates },
        slack: None,
        quantisation: "Q8_0".into(),
        context: 1_000,
        endpoints: vec![Endpoint::Chat],
        abilities: 0b1,
        demo: false,
        state: ModelState::Warm,
        load: 0,
        tokens_per_second: 50,
        first_token: Span::millis(100),
    }
}

struct Map(Vec<(u8, String, bool, Vec<ModelOffer>)>);

impl Map {
    fn of(prices: &[u64]) -> Self {
        let hosts = (1..).zip(prices);
        Self(hosts.map(|(n, price)| (n, format!("h{n}"), true, vec![offer(*price)])).collect())
    }

    fn offer(&mut self, n: usize) -> &mut ModelOffer {
        &mut self.0[n - 1].3[0]
    }

    fn hosts(&self) -> Vec<Host<'_>> {
        self.0
            .iter()
            .map(|(n, name, up, models)| Host { key: KeyId([*n; 32]), name, up: *up, models })
            .collect()
    }
}

fn question<'a>() -> Question<'a> {
    Question {
        model: "m",
        endpoint: Endpoint::Chat,
        needs: 0,
        prompt_tokens: 100,
        max_tokens: None,
        class: Wanted::Firm,
        sort: Sort::Balanced,
        max_price: (None, None),
        order: &[],
        only: &[],
        ignore: &[],
        allow_fallbacks: true,
        quantizations: &[],
        min_throughput: None,
        max_latency: None,
        prefixes: &[],
    }
}

fn names(router: &mut Router, question: &Question<'_>, map: &Map, seed: u64) -> Vec<String> {
    let chosen = router.choose(Boot(1_000), question, &map.hosts(), &mut Dice::new(seed));
    chosen.expect("somebody").into_iter().map(|choice| choice.name).collect()
}

#[test]
fn what_was_asked_for_decides_who_may_answer_and_in_which_order() {
    let mut map = Map::of(&[100, 200, 400]);
    map.offer(2).tokens_per_second = 500;
    map.offer(3).first_token = Span::millis(5);
    map.offer(3).quantisation = "bf16".into();
    let [one, three] = ["h1", "h3"].map(|name| vec![name.to_string()]);
    let both: Vec<String> = vec!["h3".into(), "h1".into()];
    let key = vec![KeyId([2; 32]).to_string()];
    let q8 = vec!["q8_0".to_string()];
    let cases: Vec<(&str, Question<'_>, &[&str])> = vec![
        ("the cheapest first", Question { sort: Sort::Price, ..question() }, &["h1", "h2", "h3"]),
        ("the fastest", Question { sort: Sort::Throughput, only: &key, ..question() }, &["h2"]),
        ("by key", Question { only: &key, ..question() }, &["h2"]),
        ("without one", Question { ignore: &one, sort: Sort::Price, ..question() }, &["h2", "h3"]),
        (
            "named first, then others",
            Question { order: &three, sort: Sort::Price, ..question() },
            &["h3", "h1", "h2"],
        ),
        (
            "named only",
            Question { order: &both, allow_fallbacks: false, ..question() },
            &["h3", "h1"],
        ),
        ("one try", Question { sort: Sort::Price, allow_fallbacks: false, ..question() }, &["h1"]),
        ("not too dear", Question { max_price: (Some(150), None), ..question() }, &["h1"]),
        (
            "nor what is answered",
            Question { max_price: (None, Some(800)), sort: Sort::Price, ..question() },
            &["h1", "h2"],
        ),
        (
            "weights kept so",
            Question { quantizations: &q8, sort: Sort::Price, ..question() },
            &["h1", "h2"],
        ),
        (
            "fast enough first",
            Question { min_throughput: Some(100), sort: Sort::Price, ..question() },
            &["h2", "h1", "h3"],
        ),
        (
            "soon enough first",
            Question { max_latency: Some(Span::millis(50)), sort: Sort::Price, ..question() },
            &["h3", "h1", "h2"],
        ),
    ];
    for (what, question, expected) in cases {
        for seed in 0..20 {
            assert_eq!(names(&mut Router::default(), &question, &map, seed), expected, "{what}");
        }
    }
    let first = |sort, seed| {
        names(&mut Router::default(), &Question { sort, ..question() }, &map, seed)[0].clone()
    };
    assert!((0..20).all(|seed| first(Sort::Throughput, seed) == "h2"));
    assert!((0..20).all(|seed| first(Sort::Latency, seed) == "h3"));
}

#[test]
fn where_nobody_may_answer_it_says_why() {
    let mut map = Map::of(&[100, 200]);
    map.0[0].2 = false;
    let none = |question: &Question<'_>, map: &Map| {
        let chosen = Router::default().choose(Boot(0), question, &map.hosts(), &mut Dice::new(1));
        chosen.expect_err("nobody")
    };
    assert_eq!(none(&Question { model: "n", ..question() }, &map), Nobody::Unknown);
    let unable = Question { needs: 0b110, ..question() };
    assert_eq!(none(&unable, &map), Nobody::Unable(Lack::Abilities(0b110)));
    let unable = Question { endpoint: Endpoint::Embeddings, ..question() };
    assert_eq!(none(&unable, &map), Nobody::Unable(Lack::Endpoint));
    let long = none(&Question { prompt_tokens: 2_002, ..question() }, &map);
    assert_eq!(long, Nobody::Unable(Lack::Context(1_000)));
    let dear = none(&Question { max_price: (Some(150), None), ..question() }, &map);
    let Nobody::Against(reasons) = &dear else { panic!("{dear:?}") };
    assert_eq!(reasons.len(), 2);
    assert!(dear.to_string().contains("h1: it is down"), "{dear}");
    assert!(dear.to_string().contains("h2: it takes"), "{dear}");
    map.0.clear();
    assert_eq!(none(&question(), &map), Nobody::Unknown);
}

#[test]
fn what_can_wait_goes_where_that_costs_less() {
    let mut map = Map::of(&[100, 200, 50]);
    map.offer(1).slack = Some(map.offer(1).terms.rates.permille(500));
    map.offer(2).slack = Some(map.offer(2).terms.rates.permille(100));
    let asked = |map: &Map, class: Wanted, max_price: Option<u64>| {
        let max_price = (max_price, None);
        let question = Question { class, max_price, sort: Sort::Price, ..question() };
        let chosen = Router::default().choose(Boot(0), &question, &map.hosts(), &mut Dice::new(1));
        chosen.map(|chosen| {
            let chosen = chosen.into_iter();
            chosen.map(|one| (one.name, one.class, one.terms.rates.prompt.0)).collect::<Vec<_>>()
        })
    };
    let said = |said: &[(&str, Class, u64)]| -> Vec<(String, Class, u64)> {
        said.iter().map(|(name, class, price)| ((*name).to_owned(), *class, *price)).collect()
    };
    use Class::{Firm, Slack};
    let both = ["h1", "h2"].map(str::to_owned);
    let firm = said(&[("h3", Firm, 50), ("h1", Firm, 100), ("h2", Firm, 200)]);
    let slack = said(&[("h2", Slack, 20), ("h1", Slack, 50)]);
    assert_eq!(asked(&map, Wanted::Firm, None).as_ref(), Ok(&firm));
    assert_eq!(asked(&map, Wanted::Slack, None).as_ref(), Ok(&slack));
    // Those who sell it firmly come after, for where the others fail.
    let all: Vec<_> = slack.iter().chain(&firm).cloned().collect();
    assert_eq!(asked(&map, Wanted::SlackIfSold, None).as_ref(), Ok(&all));
    let cheap = said(&[("h2", Slack, 20)]);
    assert_eq!(asked(&map, Wanted::SlackIfSold, Some(30)).as_ref(), Ok(&cheap), "its own price");
    // One that had no time is asked last for a while, for what can wait alone; what hurries does not ask
    // it at all, and the firm ones after the others.
    let mut router = Router::default();
    let one = KeyId([1; 32]);
    for n in 0..3 {
        router.begun(Boot(n), (one, Slack), "m");
        router.ended(Boot(n), (one, Slack), "m", &[], Went::NoTime);
    }
    let mut asked_at = |at: u64, class, alone: bool| {
        let allow_fallbacks = !alone;
        let question =
            Question { class, sort: Sort::Price, only: &both, allow_fallbacks, ..question() };
        let chosen = router.choose(Boot(at), &question, &map.hosts(), &mut Dice::new(at));
        let chosen = chosen.expect("somebody").into_iter();
        chosen.map(|one| format!("{} {:?}", one.name, one.class)).collect::<Vec<_>>()
    };
    assert_eq!(asked_at(4_000, Wanted::Firm, false), ["h1 Firm", "h2 Firm"]);
    assert_eq!(asked_at(4_000, Wanted::Slack, false), ["h2 Slack", "h1 Slack"]);
    let hurried = asked_at(4_000, Wanted::SlackFirst, false);
    assert_eq!(hurried, ["h2 Slack", "h1 Firm", "h2 Firm"]);
    assert_eq!(
        asked_at(4_000, Wanted::SlackFirst, true),
        ["h2 Slack", "h2 Firm"],
        "one node alone"
    );
    assert_eq!(asked_at(4_000, Wanted::SlackIfSold, true), ["h2 Slack"]);
    assert_eq!(asked_at(4_010, Wanted::SlackFirst, false)[1], "h1 Slack", "a while is over");
    // Nobody that is there sells it so.
    for host in &mut map.0[..2] {
        host.2 = false;
    }
    assert_eq!(asked(&map, Wanted::SlackIfSold, None), Ok(said(&[("h3", Firm, 50)])));
    let Err(Nobody::Against(reasons)) = asked(&map, Wanted::Slack, None) else { panic!() };
    assert!(reasons.contains(&("h3".into(), "it sells no slack".into())), "{reasons:?}");
    // Nobody at all does.
    map.0.drain(..2);
    assert_eq!(asked(&map, Wanted::Slack, None), Err(Nobody::Unable(Lack::Slack)));
}

#[test]
fn one_that_failed_comes_last_for_a_while_and_what_was_seen_counts_more_than_what_is_said() {
    let map = Map::of(&[100, 200]);
    let cheap = KeyId([1; 32]);
    let mut router = Router::default();
    let at = |router: &mut Router, at: u64, sort| {
        let question = Question { sort, ..question() };
        let chosen = router.choose(Boot(at), &question, &map.hosts(), &mut Dice::new(at));
        chosen.expect("somebody")[0].name.clone()
    };
    assert_eq!(at(&mut router, 0, Sort::Price), "h1");
    for n in 0..3 {
        router.begun(Boot(n), (cheap, Class::Firm), "m");
        router.ended(Boot(n), (cheap, Class::Firm), "m", &[], Went::Failed);
    }
    assert_eq!(at(&mut router, 4_000, Sort::Price), "h2", "three times: four seconds");
    assert_eq!(at(&mut router, 4_010, Sort::Price), "h1");
    router.begun(Boot(5_000), (cheap, Class::Firm), "m");
    let (first_token, took) = (Span::millis(10), Span::secs(1));
    router.ended(
        Boot(6_000),
        (cheap, Class::Firm),
        "m",
        &[],
        Went::Well { first_token, tokens: 301, took },
    );
    assert_eq!(at(&mut router, 6_000, Sort::Throughput), "h1");
    assert_eq!(at(&mut router, 6_001, Sort::Latency), "h1");
}

#[test]
fn prompts_that_begin_alike_stay_on_one_node_while_it_is_not_overloaded() {
    let map = Map::of(&[100; 8]);
    let mut router = Router::default();
    let prefixes = [11, 22, 33];
    let well = Went::Well { first_token: Span::millis(9), tokens: 2, took: Span::millis(9) };
    let home = KeyId([5; 32]);
    router.begun(Boot(0), (home, Class::Firm), "m");
    router.ended(Boot(0), (home, Class::Firm), "m", &prefixes, well);
    let first = |router: &mut Router, prefixes: &[u64], seed| {
        let question = Question { prefixes, ..question() };
        names(router, &question, &map, seed)[0].clone()
    };
    assert!((0..50).all(|seed| first(&mut router, &[11, 22, 99], seed) == "h5"));
    assert!((0..50).any(|seed| first(&mut router, &[99], seed) != "h5"));
    (0..6).for_each(|n| router.begun(Boot(n), (home, Class::Firm), "m"));
    assert!((0..50).any(|seed| first(&mut router, &[11, 22], seed) != "h5"), "it is overloaded");
}

#[test]
fn a_crowd_of_entry_nodes_does_not_herd_and_prefers_the_cheap() {
    // Each knows only the offers and what it asked itself: loads are as old as the offers are.
    let map = Map::of(&[100, 100, 100, 100, 200]);
    let mut routers: Vec<_> = (0..50).map(|_| Router::default()).collect();
    let mut asked: BTreeMap<String, u32> = BTreeMap::new();
    for round in 0..40 {
        for (n, router) in (0..).zip(&mut routers) {
            let first = names(router, &question(), &map, round * 1_000 + n)[0].clone();
            *asked.entry(first).or_default() += 1;
        }
    }
    let all: u32 = asked.values().sum();
    for n in 1..=4 {
        let share = asked[&format!("h{n}")] * 100 / all;
        assert!((18..=30).contains(&share), "h{n} has {share} % of {asked:?}");
    }
    let dear = asked["h5"] * 100 / all;
    assert!((2..=10).contains(&dear), "a quarter as often: {dear} %");
}
